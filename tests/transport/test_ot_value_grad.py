"""The op `ot_value_grad`: points, whose cost is made on the fly, and the smoothed dual."""

import dashpot
import pytest
import torch
from dashpot import functional as F
from dashpot.transport._problem import points_cost
from dashpot.transport.ot_value_grad import OT_VALUE_GRAD

D = torch.float64
METRICS = ["sqeuclidean", "euclidean", "inner"]


def clouds(m, n, d, dtype=D, batch=()):
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (torch.randn(*batch, s, d, generator=generator, dtype=D) for s in (m, n))
    alpha, beta = (torch.randn(*batch, s, generator=generator, dtype=D) for s in (m, n))
    return x.to(dtype), y.to(dtype), alpha, beta


@pytest.mark.usefixtures("backend64")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (5, 3, 1), (1, 70, 2), (67, 35, 300)])
@pytest.mark.parametrize(("reg", "k"), [("sparse", 3), ("sparse", 12), ("l2", None)])
def test_points_are_their_cost(metric, m, n, d, reg, k):
    """One row, one coordinate, many; beside strips of 32 and vectors of any width."""
    x, y, alpha, beta = clouds(m, n, d)
    cost = points_cost(x[None], y[None], metric)[0]
    options = {"reg": reg, "max_nz": k, "gamma": 0.5}
    for column in (None, beta):
        got = F.ot_value_grad(alpha, x, beta=column, y=y, metric=metric, **options)
        want = F.ot_value_grad(alpha, cost, beta=column, **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("backend64")
def test_stored_costs_are_those_of_the_other_ops(spec_problem):
    p = spec_problem()
    rest = {"gamma": 0.5, "max_nz": 2}
    semi = F.ot_value_grad(p["alpha"], p["cost"], p["a"], p["b"], **rest)
    want = F.ot_semidual_value_grad(p["alpha"], p["cost"], p["a"], p["b"], **rest)
    torch.testing.assert_close(semi, want)
    assert semi[0].item() == pytest.approx(0.2484375)
    dual = F.ot_value_grad(p["alpha"], p["cost"], p["a"], p["b"], p["beta"], **rest)
    want = F.ot_dual_value_grad(p["alpha"], p["beta"], p["cost"], p["a"], p["b"], **rest)
    torch.testing.assert_close(dual, want)


@pytest.mark.usefixtures("backend64")
@pytest.mark.parametrize("smoothing", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_smoothed_dual(smoothing, k):
    """Its gradient by differences, and its limits: below the dual of the k largest by at most mu k
    / 2 per column."""
    x, y, alpha, beta = clouds(40, 21, 2)
    alpha = alpha + 2

    def value(alpha, beta, smoothing=smoothing):
        return F.ot_value_grad(alpha, x, beta=beta, y=y, max_nz=k, smoothing=smoothing)

    obj, rows, columns = value(alpha, beta)
    step = 1e-5 * smoothing  # the dual bends within mu
    for i in (0, 7, 20):
        for which, grad in ((0, rows), (1, columns)):
            ends = []
            for sign in (1, -1):
                moved = [alpha.clone(), beta.clone()]
                moved[which][i] += sign * step
                ends.append(value(*moved)[0])
            slope = (ends[0] - ends[1]) / (2 * step)
            assert slope.item() == pytest.approx(grad[i].item(), rel=1e-3, abs=1e-3)
    plain = value(alpha, beta, 0.0)[0]
    # Omega+ smoothed lies between Omega+ - mu k / 2 and the l2 Omega+ of more entries.
    assert obj <= plain + 21 * smoothing * k / 2


@pytest.mark.usefixtures("backend64")
def test_a_level_to_start_from_changes_nothing():
    x, y, alpha, beta = (one[None] for one in clouds(40, 33, 3))
    a, b = (torch.full((1, s), 1 / s, dtype=D) for s in (40, 33))
    mu = torch.tensor([0.02], dtype=D)
    rest = mu, None, "sqeuclidean", "sparse", 1.0, 4
    *first, level = OT_VALUE_GRAD.forward_op(alpha + 2, beta, x, y, a, b, *rest)
    assert level.shape == (1, 33) and bool((level > 0).any())
    for start in (level, 0.9 * level, 3 * level + 1):
        again = OT_VALUE_GRAD.forward_op(alpha + 2, beta, x, y, a, b, mu, start, *rest[2:])
        torch.testing.assert_close(again[:3], tuple(first), rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("backend64")
def test_each_problem_has_its_own_smoothing():
    x, y, alpha, beta = clouds(20, 15, 2, batch=(3,))
    a, b = (torch.full((3, s), 1 / s, dtype=D) for s in (20, 15))
    mu = torch.tensor([0.1, 0.01, 1e-3], dtype=D)
    rest = "sqeuclidean", "sparse", 1.0, 2
    many = OT_VALUE_GRAD(alpha, beta, x, y, a, b, mu, None, *rest)
    for p in range(3):
        one = (t[p : p + 1] for t in (alpha, beta, x, y, a, b, mu))
        alone = OT_VALUE_GRAD(*one, None, *rest)
        assert all(torch.equal(u[p : p + 1], v) for u, v in zip(many, alone, strict=True))


def test_distances_do_not_cancel():
    """Points far from the origin and near each other, in float32: |x|^2 + |y|^2 - 2 x.y would
    leave nothing of 1e-6 beside 1e6."""
    x = torch.tensor([[1000.0, 1000.0], [1000.0, 1000.001]])
    y = torch.tensor([[1000.0, 1000.0005]])
    true = ((x.double()[:, None] - y.double()) ** 2).sum(-1)
    with dashpot.backend("cpp"):
        _, _, beta = F.ot_value_grad(torch.zeros(2), x, y=y, max_nz=1, gamma=1e-9)
    torch.testing.assert_close(beta.double(), true.min(0).values, rtol=1e-5, atol=2e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_points_are_widened(dtype):
    x, y, alpha, _ = clouds(20, 15, 3, dtype)
    got = F.ot_value_grad(alpha, x, y=y, max_nz=3)
    want = F.ot_value_grad(alpha, x.float(), y=y.float(), max_nz=3)
    assert got[0].dtype == torch.float32
    assert all(torch.equal(u, v) for u, v in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": torch.zeros(3, 2, dtype=D)}, r"y: expected \(3, 3\) in torch.float64"),
        ({"y": torch.zeros(3, 3)}, "y: expected .* got .* in torch.float32"),
        ({"y": torch.zeros(0, 3, dtype=D)}, r"y: expected \(..., n, d\)"),
        ({"metric": "cityblock"}, "metric: expected one of sqeuclidean"),
        ({"smoothing": 0.1}, "smoothing: expected 0 but for"),
        ({"smoothing": -1.0}, "smoothing: expected a number of at least 0"),
        ({"a": torch.zeros(3, dtype=D)}, "a: expected"),
    ],
)
def test_errors(options, message):
    x = torch.zeros(4, 3, dtype=D)
    rest = {"y": torch.zeros(5, 3, dtype=D), "max_nz": 2, **options}
    with pytest.raises(ValueError, match=message):
        F.ot_value_grad(torch.zeros(4, dtype=D), x, **rest)
