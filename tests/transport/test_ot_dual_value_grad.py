"""ot_dual_value_grad: the dual of regularised transport and its gradients."""

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers

pytestmark = pytest.mark.tests_op("ot_dual_value_grad")


def problem(m, n, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(device)

    cost, a, b, alpha, beta = rand(m, n) * 2, rand(m) + 0.1, rand(n) + 0.1, rand(m), rand(n)
    return alpha, beta, cost, a / a.sum(), b / b.sum()


@pytest.mark.parametrize(
    ("options", "value", "grad_alpha", "grad_beta"),
    [
        ({"max_nz": 1}, 0.0475, [-0.9, -0.5, -0.3, 0.1], [-0.7, -0.45, -0.45]),
        ({"max_nz": 2}, -0.345, [-0.9, -0.5, -2, 0.1], [-1.8, -1.05, -0.45]),
        ({"reg": "l2"}, -0.345, [-0.9, -0.5, -2, 0.1], [-1.8, -1.05, -0.45]),
        ({"reg": "negentropy"}, -2.4118487485, None,
         [-2.2184858414, -1.7348642717, -1.1753473840]),
    ],
)  # fmt: skip
def test_vectors_of_the_specification(backend64, spec_problem, options, value, grad_alpha,
                                      grad_beta):  # fmt: skip
    one = spec_problem(device=backend64.device)
    args = (one[name] for name in ("alpha", "beta", "cost", "a", "b"))
    got = dashpot.ot_dual_value_grad(*args, gamma=0.5, **options)
    assert got[0].item() == pytest.approx(value, abs=1e-10)
    for grad, want in zip(got[1:], (grad_alpha, grad_beta), strict=True):
        if want is not None:
            torch.testing.assert_close(
                grad, torch.tensor(want, dtype=torch.float64).to(grad), atol=1e-9, rtol=0
            )


@pytest.mark.parametrize("k", [1, 3, 11])
@pytest.mark.parametrize("reg", ["negentropy", "l2", "sparse"])
def test_gradients_are_those_of_the_value(backend64, reg, k):
    alpha, beta, cost, a, b = problem(23, 9, device=backend64.device)
    options = {"reg": reg, "gamma": 0.3, "max_nz": k if reg == "sparse" else None}
    _, *grads = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, **options)
    for which, grad in enumerate(grads):
        for i in (0, 5):
            steps = [torch.zeros_like(alpha), torch.zeros_like(beta)]
            steps[which][i] = 1e-6
            up, down = (
                dashpot.ot_dual_value_grad(
                    alpha + s * steps[0], beta + s * steps[1], cost, a, b, **options
                )[0]
                for s in (1, -1)
            )
            assert float(up - down) / 2e-6 == pytest.approx(grad[i].item(), abs=1e-7)


@given(st.integers(0, 99))
def test_never_above_a_feasible_plan(backend64, seed):
    """Weak duality: T = a b^T is feasible for l2."""
    alpha, beta, cost, a, b = problem(12, 7, seed, backend64.device)
    value = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, reg="l2", gamma=0.5)[0]
    plan = a[:, None] * b
    primal = (plan * cost).sum() + 0.25 * plan.square().sum()
    assert value.item() <= primal.item()


@given(st.integers(0, 99))
def test_concave_along_segments(backend64, seed):
    alpha, beta, cost, a, b = problem(15, 8, seed, backend64.device)
    ends = (alpha, beta), (alpha.flip(0) * 2, -beta)
    middle = tuple((x + y) / 2 for x, y in zip(*ends, strict=True))
    at = [
        dashpot.ot_dual_value_grad(*x, cost, a, b, max_nz=2, gamma=0.1)[0].item()
        for x in (ends[0], middle, ends[1])
    ]
    assert at[1] >= (at[0] + at[2]) / 2 - 1e-12


def test_opposite_shifts_change_nothing(backend64):
    alpha, beta, cost, a, b = problem(12, 7, device=backend64.device)
    got = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, max_nz=3)
    moved = dashpot.ot_dual_value_grad(alpha + 0.4, beta - 0.4, cost, a, b, max_nz=3)
    for x, y in zip(got, moved, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("k", [9, 31, 32, 33])
@pytest.mark.parametrize("m", [33, 64, 95, 300])
def test_columns_that_are_sorted(backend64, m, k):
    """Around the width of the sorting network; ties, and columns with few positive scores."""
    alpha, beta, cost, a, b = problem(m, 19, seed=m + k)
    alpha, beta, cost = (x.round(decimals=2) for x in (alpha, beta, cost))
    beta[4] -= 1
    cost[5:, 5] = torch.inf
    with dashpot.backend("reference"):
        want = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, max_nz=k, gamma=0.3)
    args = (x.to(backend64.device) for x in (alpha, beta, cost, a, b))
    got = dashpot.ot_dual_value_grad(*args, max_nz=k, gamma=0.3)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [2, 12])
def test_equal_scores_take_the_first_rows(backend64, k):
    """All scores 1: k rows of each column get 1 / gamma."""
    shape = {"dtype": torch.float64, "device": backend64.device}
    alpha, beta, cost = (
        torch.ones(20, **shape),
        torch.zeros(5, **shape),
        torch.zeros(20, 5, **shape),
    )
    value, grad, _ = dashpot.ot_dual_value_grad(alpha, beta, cost, None, None, max_nz=k, gamma=2.0)
    rows = (torch.arange(20, device=backend64.device) < k).double()
    torch.testing.assert_close(grad, 1 / 20 - rows * 5 / 2.0)
    assert value.item() == pytest.approx(1 - 5 * k / 4)


@pytest.mark.parametrize("reg", ["negentropy", "l2", "sparse"])
def test_forbidden_pairs_get_no_mass(backend64, reg):
    alpha, beta, cost, a, b = problem(30, 20, device=backend64.device)
    cost[:, 5] = torch.inf
    cost[3] = torch.inf
    options = {"reg": reg, "max_nz": 4 if reg == "sparse" else None}
    _, grad_alpha, grad_beta = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, **options)
    assert grad_alpha[3].item() == a[3].item() and grad_beta[5].item() == b[5].item()
    assert bool(grad_alpha.isfinite().all()) and bool(grad_beta.isfinite().all())


@pytest.mark.peers
@pytest.mark.parametrize("k", [1, 3, 20])
def test_value_and_gradients_of_pot(backend64, k):
    smooth = peers.load("ot.smooth")
    alpha, beta, cost, a, b = problem(40, 15)
    regularizer = smooth.SparsityConstrained(gamma=0.7, max_nz=k)
    want = smooth.dual_obj_grad(*(x.numpy() for x in (alpha, beta, a, b, cost)), regularizer)
    args = (x.to(backend64.device) for x in (alpha, beta, cost, a, b))
    got = dashpot.ot_dual_value_grad(*args, gamma=0.7, max_nz=k)
    assert got[0].item() == pytest.approx(want[0], abs=1e-12)
    for x, y in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(x.cpu(), torch.from_numpy(y), atol=1e-12, rtol=0)


def test_errors():
    alpha, beta, cost, a, b = problem(4, 3)
    with pytest.raises(ValueError, match=r"beta: expected \(3,\).*got \(4,\)"):
        dashpot.ot_dual_value_grad(alpha, alpha, cost, a, b, max_nz=1)
    with pytest.raises(TypeError, match=r"alpha: .*Tensor.*got list"):
        dashpot.ot_dual_value_grad([1.0], beta, cost, a, b, max_nz=1)
