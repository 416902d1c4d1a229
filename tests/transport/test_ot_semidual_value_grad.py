"""ot_semidual_value_grad: the semi-dual of regularised transport and its gradient."""

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers

pytestmark = pytest.mark.tests_op("ot_semidual_value_grad")


def problem(m, n, seed=0, device="cpu", batch=()):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*batch, *shape, generator=generator, dtype=torch.float64).to(device)

    cost, a, b, alpha = rand(m, n) * 3, rand(m) + 0.1, rand(n) + 0.1, rand(m)
    return alpha, cost, a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "value", "grad", "beta"),
    [
        ({"max_nz": 1}, 0.27125, [-0.2, -0.05, 0.15, 0.1], [-0.25, -0.175, -0.425]),
        ({"max_nz": 2}, 0.2484375, [0, 0.025, -0.125, 0.1], [-0.35, -0.2125, -0.425]),
        ({"reg": "l2"}, 0.2484375, [0, 0.025, -0.125, 0.1], [-0.35, -0.2125, -0.425]),
        ({"reg": "negentropy"}, -0.7473749099,
         [-0.0118020837, 0.0318597426, -0.0176349599, -0.0024226990], None),
    ],
)  # fmt: skip
def test_vectors_of_the_specification(backend64, spec_problem, options, value, grad, beta):
    one = spec_problem(device=backend64.device)
    args = one["alpha"], one["cost"], one["a"], one["b"]
    got = dashpot.ot_semidual_value_grad(*args, gamma=0.5, **options)
    assert got[0].item() == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(
        got[1], torch.tensor(grad, dtype=torch.float64).to(got[1]), atol=1e-9, rtol=0
    )
    if beta is not None:
        torch.testing.assert_close(
            got[2], torch.tensor(beta, dtype=torch.float64).to(got[2]), atol=1e-10, rtol=0
        )


@given(m=st.integers(1, 6), n=st.integers(1, 4), k=st.integers(1, 6), seed=st.integers(0, 99))
def test_every_support_tried(backend64, best_column, m, n, k, seed):
    alpha, cost, a, b = problem(m, n, seed)
    k, gamma = min(k, m), 0.4
    args = (x.to(backend64.device) for x in (alpha, cost, a, b))
    value, grad, _ = dashpot.ot_semidual_value_grad(*args, gamma=gamma, max_nz=k)
    best = [best_column(alpha - cost[:, j], float(b[j]), gamma, k) for j in range(n)]
    want = float(a @ alpha) - sum(one[0] for one in best)
    assert value.item() == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(grad.cpu(), a - sum(t for _, t in best), atol=1e-12, rtol=0)


@pytest.mark.parametrize("reg", ["negentropy", "l2", "sparse"])
@pytest.mark.parametrize("k", [3, 11])
def test_gradient_is_that_of_the_value(backend64, reg, k):
    alpha, cost, a, b = problem(23, 9, device=backend64.device)
    options = {"reg": reg, "gamma": 0.3, "max_nz": k if reg == "sparse" else None}
    _, grad, _ = dashpot.ot_semidual_value_grad(alpha, cost, a, b, **options)
    for i in (0, 7, 22):
        step = torch.zeros_like(alpha)
        step[i] = 1e-6
        up, down = (
            dashpot.ot_semidual_value_grad(alpha + s, cost, a, b, **options)[0]
            for s in (step, -step)
        )
        assert float(up - down) / 2e-6 == pytest.approx(grad[i].item(), abs=1e-7)


@pytest.mark.parametrize("reg", ["negentropy", "l2", "sparse"])
def test_the_dual_at_its_beta_has_the_same_value(backend64, reg):
    alpha, cost, a, b = problem(40, 21, device=backend64.device)
    options = {"reg": reg, "gamma": 0.2, "max_nz": 2 if reg == "sparse" else None}
    value, grad, beta = dashpot.ot_semidual_value_grad(alpha, cost, a, b, **options)
    dual, grad_alpha, grad_beta = dashpot.ot_dual_value_grad(alpha, beta, cost, a, b, **options)
    assert dual.item() == pytest.approx(value.item(), abs=1e-12)
    torch.testing.assert_close(grad_alpha, grad, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad_beta, torch.zeros_like(grad_beta), atol=1e-12, rtol=0)


def test_shifting_alpha_moves_beta_against_it(backend64):
    alpha, cost, a, b = problem(12, 7, device=backend64.device)
    value, grad, beta = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=3)
    moved = dashpot.ot_semidual_value_grad(alpha + 0.7, cost, a, b, max_nz=3)
    torch.testing.assert_close(moved[0], value)
    torch.testing.assert_close(moved[1], grad)
    torch.testing.assert_close(moved[2], beta - 0.7)


@given(st.integers(0, 99))
def test_concave_along_segments(backend64, seed):
    alpha, cost, a, b = problem(15, 8, seed, backend64.device)
    other = alpha.flip(0) * 2
    at = [
        dashpot.ot_semidual_value_grad(x, cost, a, b, max_nz=2, gamma=0.1)[0].item()
        for x in (alpha, (alpha + other) / 2, other)
    ]
    assert at[1] >= (at[0] + at[2]) / 2 - 1e-12


@pytest.mark.parametrize("k", [3, 20])
def test_rows_and_columns_may_come_in_any_order(backend64, k):
    alpha, cost, a, b = problem(33, 18, device=backend64.device)
    rows = torch.randperm(33, generator=torch.Generator().manual_seed(1)).to(backend64.device)
    columns = torch.randperm(18, generator=torch.Generator().manual_seed(2)).to(backend64.device)
    value, grad, beta = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=k)
    moved = dashpot.ot_semidual_value_grad(
        alpha[rows], cost[rows][:, columns], a[rows], b[columns], max_nz=k
    )
    torch.testing.assert_close(moved[0], value)
    torch.testing.assert_close(moved[1], grad[rows])
    torch.testing.assert_close(moved[2], beta[columns])


@pytest.mark.parametrize("k", [3, 20])
@pytest.mark.parametrize(("m", "n"), [(2300, 3), (531, 37), (22, 1100)])
def test_long_and_wide_problems(backend64, m, n, k):
    """Columns too long for a block's shared memory; lists, with ends of rows and of lanes; more
    tiles of columns than blocks."""
    alpha, cost, a, b = problem(m, n)
    cost = cost.round(decimals=2)  # and ties
    with dashpot.backend("reference"):
        want = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=k, gamma=0.7)
    args = (x.to(backend64.device) for x in (alpha, cost, a, b))
    got = dashpot.ot_semidual_value_grad(*args, max_nz=k, gamma=0.7)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.01, 5.0])  # few entries of a column, or k of most
@pytest.mark.parametrize("k", [9, 31, 32, 33])
@pytest.mark.parametrize("m", [33, 64, 95, 300])
def test_columns_that_are_sorted(backend64, m, k, gamma):
    """Around the width of the sorting network; ties, columns without mass or with few pairs."""
    alpha, cost, a, b = problem(m, 19, seed=m + k)
    cost = cost.round(decimals=2)
    alpha = alpha.round(decimals=2)
    b[3] = 0
    cost[5:, 4] = torch.inf
    with dashpot.backend("reference"):
        want = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=k, gamma=gamma)
    args = (x.to(backend64.device) for x in (alpha, cost, a, b))
    got = dashpot.ot_semidual_value_grad(*args, max_nz=k, gamma=gamma)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=1e-11, atol=1e-12)


def test_no_problem(backend64):
    alpha, cost, a, b = problem(6, 5, device=backend64.device, batch=(2, 0))
    got = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=2)
    assert [tuple(x.shape) for x in got] == [(2, 0), (2, 0, 6), (2, 0, 5)]


def test_a_large_k_is_l2(backend64):
    alpha, cost, a, b = problem(50, 20, device=backend64.device)
    sparse = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=49)
    for got, want in zip(
        sparse, dashpot.ot_semidual_value_grad(alpha, cost, a, b, reg="l2"), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("k", [2, 12])
@pytest.mark.parametrize("reg", ["negentropy", "l2", "sparse"])
def test_forbidden_pairs_get_no_mass(backend64, reg, k):
    """Row 0 may go to column 3 only; column 5 has no admissible row."""
    alpha, cost, a, b = problem(30, 20, device=backend64.device)
    cost[0, torch.arange(20) != 3] = torch.inf
    cost[:, 5] = torch.inf
    options = {"reg": reg, "max_nz": k if reg == "sparse" else None}
    _, grad, beta = dashpot.ot_semidual_value_grad(alpha, cost, a, b, **options)
    assert bool(grad.isfinite().all()) and beta[5].item() == torch.inf
    assert (a - grad).sum().item() == pytest.approx(1 - b[5].item())
    others = torch.arange(20) != 5
    want = dashpot.ot_semidual_value_grad(alpha, cost[:, others], a, b[others], **options)
    torch.testing.assert_close(grad, want[1])


def test_batches_of_any_shape_and_default_masses(backend64):
    alpha, cost, _, _ = problem(9, 6, device=backend64.device, batch=(2, 3))
    value, grad, beta = dashpot.ot_semidual_value_grad(alpha, cost, None, None, max_nz=2)
    assert (value.shape, grad.shape, beta.shape) == ((2, 3), (2, 3, 9), (2, 3, 6))
    one = dashpot.ot_semidual_value_grad(alpha[1, 2], cost[1, 2], None, None, max_nz=2)
    assert value[1, 2].item() == one[0].item()
    assert grad.sum(-1).abs().max().item() < 1e-12  # the masses agree, so Q is flat along (1, ..)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_cost_is_rounded_once(backend, dtype):
    alpha, cost, a, b = (x.float() for x in problem(30, 20, device=backend.device))
    cost = cost.to(dtype)
    got = dashpot.ot_semidual_value_grad(alpha, cost, a, b, max_nz=3)
    want = dashpot.ot_semidual_value_grad(alpha, cost.float(), a, b, max_nz=3)
    assert got[0].dtype == torch.float32
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.peers
@pytest.mark.parametrize("k", [1, 3, 20])
def test_value_and_gradient_of_pot(backend64, k):
    smooth = peers.load("ot.smooth")
    alpha, cost, a, b = problem(40, 15)
    regularizer = smooth.SparsityConstrained(gamma=0.7, max_nz=k)
    value, grad = smooth.semi_dual_obj_grad(*(x.numpy() for x in (alpha, a, b, cost)), regularizer)
    args = (x.to(backend64.device) for x in (alpha, cost, a, b))
    got = dashpot.ot_semidual_value_grad(*args, gamma=0.7, max_nz=k)
    assert got[0].item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(got[1].cpu(), torch.from_numpy(grad), atol=1e-12, rtol=0)


def test_errors():
    alpha, cost, a, b = problem(4, 3)
    call = dashpot.ot_semidual_value_grad
    with pytest.raises(ValueError, match=r"cost: expected \(\.\.\., m, n\), got \(4,\)"):
        call(alpha, cost[:, 0], a, b, max_nz=1)
    with pytest.raises(ValueError, match=r"cost: expected m and n of at least 1, got \(0, 3\)"):
        call(alpha[:0], cost[:0], None, None, max_nz=1)
    with pytest.raises(ValueError, match=r"alpha: expected \(4,\).*got \(3,\)"):
        call(alpha[:3], cost, a, b, max_nz=1)
    with pytest.raises(ValueError, match=r"b: expected \(3,\).*got \(4,\)"):
        call(alpha, cost, a, a, max_nz=1)
    with pytest.raises(ValueError, match=r'max_nz: .*reg="sparse", got None'):
        call(alpha, cost, a, b)
    with pytest.raises(ValueError, match=r"max_nz: expected None for reg='l2', got 2"):
        call(alpha, cost, a, b, reg="l2", max_nz=2)
    with pytest.raises(ValueError, match=r"reg: expected one of .*got 'entropy'"):
        call(alpha, cost, a, b, reg="entropy")
    with pytest.raises(ValueError, match=r"gamma: expected a positive.*got 0"):
        call(alpha, cost, a, b, gamma=0, max_nz=1)
    with pytest.raises(TypeError, match=r"cost: .*got torch.int64"):
        call(alpha, cost.long(), a, b, max_nz=1)
