"""`regularized_ot_points`: everything as `regularized_ot` of the cost that it does not store."""

import subprocess
import sys

import dashpot
import pytest
import torch
from dashpot import functional as F

D = torch.float64
METRICS = ["sqeuclidean", "euclidean", "cosine", "inner"]
EVERY = [("sparse", 4), ("l2", None), ("negentropy", None)]


def cost_of(x, y, metric):
    """As a user would store it."""
    if metric == "inner":
        return -(x @ y.mT)
    if metric == "cosine":
        x, y = (torch.nn.functional.normalize(points, dim=-1) for points in (x, y))
        return 1 - x @ y.mT
    square = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
    return square.sqrt() if metric == "euclidean" else square


def clouds(m, n, d, batch=(), dtype=D):
    generator = torch.Generator().manual_seed(m + n + d)
    x, y = (torch.randn(*batch, s, d, generator=generator, dtype=D) for s in (m, n))
    a, b = (torch.rand(*batch, s, generator=generator, dtype=D) + 0.2 for s in (m, n))
    a, b = (mass / mass.sum(-1, keepdim=True) for mass in (a, b))
    return [t.to(dtype) for t in (x, y + 0.5, a, b)]


@pytest.fixture(params=["cpp", "reference"])
def kernels_or_not(request):
    with dashpot.backend(request.param):
        yield


@pytest.mark.usefixtures("kernels_or_not")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("reg", "k"), EVERY)
@pytest.mark.parametrize("sparse_dim", [-2, -1])
@pytest.mark.parametrize(("formulation", "differentiable"), [("semi_dual", "envelope"),
                                                             ("dual", "plan")])  # fmt: skip
def test_is_the_stored_cost(metric, reg, k, sparse_dim, formulation, differentiable):
    """Value, plan, and the gradients to points and masses, of the value and of the plan."""
    inputs = [t.requires_grad_() for t in clouds(23, 17, 3, batch=(2,))]
    x, y, a, b = inputs
    options = {
        "reg": reg, "max_nz": k, "sparse_dim": sparse_dim, "formulation": formulation,
        "differentiable": differentiable, "plan": "dense", "max_iter": 12,
        "solver": "sinkhorn" if (reg, formulation) == ("negentropy", "semi_dual") else "lbfgs",
    }  # fmt: skip
    got = F.regularized_ot_points(x, y, a, b, metric=metric, **options)
    want = F.regularized_ot(cost_of(x, y, metric), a, b, **options)
    for name in ("value", "alpha", "beta", "plan", "row_error", "col_error", "gap"):
        torch.testing.assert_close(
            getattr(got, name), getattr(want, name), rtol=1e-7, atol=1e-9, msg=name
        )
    assert torch.equal(got.n_eval, want.n_eval) and torch.equal(got.n_iter, want.n_iter)
    weight = torch.linspace(-1, 1, got.plan.numel(), dtype=D).view(got.plan.shape)

    def gradients(out):
        loss = out.value @ torch.tensor([1.0, 2.0], dtype=D)
        if differentiable == "plan":
            loss = loss + (out.plan * weight).sum()
        return torch.autograd.grad(loss, inputs)

    for mine, theirs in zip(gradients(got), gradients(want), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", ["newton", "auto"])
@pytest.mark.parametrize("metric", METRICS)
def test_newton(metric, solver):
    """The support listed from columns that are made, the spread of the cost from all of them."""
    x, y, a, b = clouds(40, 33, 3)
    got = F.regularized_ot_points(x, y, a, b, metric=metric, reg="l2", solver=solver, tol=1e-10)
    want = F.regularized_ot(cost_of(x, y, metric), a, b, reg="l2", solver=solver, tol=1e-10)
    assert got.status.item() == 0 and got.row_error[0] < 1e-9
    torch.testing.assert_close(got.value, want.value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (1, 9, 2), (9, 1, 3), (40, 37, 300)])
def test_odd_sizes(metric, m, n, d):
    x, y, a, b = clouds(m, n, d)
    options = {"reg": "l2", "gamma": 5.0, "max_iter": 10, "solver": "lbfgs"}
    got = F.regularized_ot_points(x, y, a, b, metric=metric, **options)
    want = F.regularized_ot(cost_of(x, y, metric), a, b, **options)
    torch.testing.assert_close(got.value, want.value, rtol=1e-8, atol=1e-9)
    assert got.plan.indices.shape == (m, n)


def test_empty_batch():
    out = F.regularized_ot_points(torch.zeros(0, 4, 2), torch.zeros(0, 3, 2), max_nz=2)
    assert out.value.shape == (0,) and out.alpha.shape == (0, 4)
    assert out.plan.values.shape == (0, 2, 3)


def test_candidate_lists_change_nothing():
    """512 rows, k = 4: lists of 64, refreshed from single columns made of strips of the rows."""
    x, y, *_ = clouds(517, 96, 5)
    out = F.regularized_ot_points(x, y, max_nz=4, solver="lbfgs", max_iter=60)
    value, *_ = F.ot_semidual_value_grad(out.alpha, cost_of(x, y, "sqeuclidean"), None, None,
                                         max_nz=4)  # fmt: skip
    assert out.value.item() == pytest.approx(value.item(), abs=1e-12)
    fast, same = (
        F.regularized_ot_points(x, y, max_nz=4, solver="lbfgs", max_iter=8),
        F.regularized_ot(cost_of(x, y, "sqeuclidean"), max_nz=4, solver="lbfgs", max_iter=8),
    )
    torch.testing.assert_close(fast.alpha, same.alpha, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_kinks_in_float32_climb_the_smoothed_dual(metric):
    """float32 points, whose costs a smoothed evaluation widens to float64."""
    x, y, *_ = clouds(60, 44, 4, dtype=torch.float32)
    out = F.regularized_ot_points(x, y, metric=metric, max_nz=2, max_iter=200)
    want = F.regularized_ot(cost_of(x.double(), y.double(), metric), max_nz=2, max_iter=200)
    assert out.value.item() == pytest.approx(want.value.item(), abs=2e-4)


def test_any_number_of_threads_gives_the_same_bits():
    x, y, *_ = clouds(300, 260, 7)
    before, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(F.regularized_ot_points(x, y, max_nz=3, max_iter=20).alpha)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("reg", "k"), EVERY)
def test_gradcheck_of_the_value(metric, reg, k):
    """At the optimum, of the points; tiny problems, which converge."""
    x, y, *_ = clouds(5, 4, 2)

    def value(x, y):
        return F.regularized_ot_points(
            x, y, metric=metric, reg=reg, max_nz=k, gamma=2.0, tol=1e-11, max_iter=3000
        ).value

    assert torch.autograd.gradcheck(
        value, (x.requires_grad_(), y.requires_grad_()), eps=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("reg", "k"), [("sparse", 3), ("l2", None), ("negentropy", None)])
def test_gradcheck_through_the_plan(reg, k):
    x, y, *_ = clouds(4, 5, 2)
    weight = torch.linspace(-1, 1, 20, dtype=D).view(4, 5)

    def loss(x, y):
        out = F.regularized_ot_points(
            x, y, reg=reg, max_nz=k, gamma=20.0, tol=1e-13, max_iter=5000, plan="dense",
            differentiable="plan",
        )  # fmt: skip
        return (out.plan * weight).sum()

    assert torch.autograd.gradcheck(
        loss, (x.requires_grad_(), y.requires_grad_()), eps=1e-5, atol=1e-5
    )


def test_second_derivative_is_refused():
    x, y, *_ = clouds(5, 4, 2)
    out = F.regularized_ot_points(x.requires_grad_(), y, max_nz=2)
    grad = torch.autograd.grad(out.value, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_points_that_meet_have_a_gradient():
    """euclidean at distance 0: 0, and finite elsewhere."""
    x, y, *_ = clouds(4, 4, 2)
    y[0] = x[0]
    for k, reg in ((2, "sparse"), (None, "l2")):
        points = x.clone().requires_grad_()
        F.regularized_ot_points(points, y, metric="euclidean", reg=reg, max_nz=k).value.backward()
        assert bool(points.grad.isfinite().all()) and bool(points.grad.any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", METRICS)
def test_short_points(dtype, metric):
    """Read as float32; gradients in their own dtype."""
    x, y, *_ = clouds(20, 15, 3, dtype=dtype)
    x = x.requires_grad_()
    got = F.regularized_ot_points(x, y, metric=metric, max_nz=3)
    want = F.regularized_ot_points(x.float(), y.float(), metric=metric, max_nz=3)
    assert torch.equal(got.value, want.value)
    assert torch.autograd.grad(got.value, x)[0].dtype == dtype


def test_compiles_in_one_graph():
    def values(x, y):
        out = F.regularized_ot_points(x, y, max_nz=3, solver="adam", max_iter=10)
        return out.plan.values

    x, y, *_ = clouds(12, 10, 3, dtype=torch.float32)
    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), values(x, y))


MEASURE = """
import resource, torch
from dashpot import functional as F
torch.set_num_threads(2)
m = n = {size}
x, y = torch.randn(m, 3), torch.randn(n, 3) + 0.5
options = dict(reg={reg!r}, max_nz={k}, solver="adam", max_iter=2, plan=None)
def run(x, y):
    x = x.requires_grad_()
    F.regularized_ot_points(x, y, **options).value.backward()
run(x[:64], y[:64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(x, y)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(("reg", "k"), [("sparse", 2), ("negentropy", None)])
def test_memory_is_never_m_times_n(reg, k):
    """The peak of a process, solve and gradient: far below the 144 MB of 6000 x 6000 float32."""
    code = MEASURE.format(size=6000, reg=reg, k=k)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 * 1024  # KiB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cityblock"}, "metric: expected one of sqeuclidean, euclidean, inner, cosine"),
        ({"y": torch.zeros(5, 2)}, r"y: expected \(5, 3\)"),
        ({"y": torch.zeros(5, 3, dtype=D)}, "y: expected .* in torch.float32"),
        ({"x": torch.zeros(3)}, r"x: expected \(..., m, d\)"),
        ({"x": torch.zeros(4, 0)}, r"x: expected \(..., m, d\)"),
        ({"x": torch.full((4, 3), torch.nan)}, "x: expected finite numbers, got NaN"),
        ({"y": torch.full((5, 3), torch.inf)}, "y: expected finite numbers, got NaN or an inf"),
        ({"x": torch.zeros(4, 3), "metric": "cosine"}, "x: expected no point 0"),
        ({"x": [1.0]}, "x: expected a torch.Tensor, got list"),
        ({"max_nz": 0}, "max_nz: expected at least 1"),
        ({"a": torch.ones(4)}, "b: expected the total of a"),
        ({"plan": "csr"}, "plan: expected one of"),
    ],
)
def test_errors(change, message):
    options = {"x": torch.ones(4, 3), "y": torch.ones(5, 3), "max_nz": 2, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        F.regularized_ot_points(options.pop("x"), options.pop("y"), **options)
