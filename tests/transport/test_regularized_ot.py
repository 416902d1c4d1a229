"""`regularized_ot`: values, plans, gradients and what it reports."""

from __future__ import annotations

import itertools

import dashpot
import numpy as np
import pytest
import torch
from dashpot import _C
from dashpot import functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from bench import peers

D = torch.float64
COST = torch.tensor(
    [[.33, .99, .32, .79, .87], [.39, .44, .37, .11, .48], [.24, .26, .18, .19, .81],
     [.42, .26, .59, .6, .65]], dtype=D,
)  # fmt: skip
EVERY = [("sparse", 3), ("l2", None), ("negentropy", None)]


@pytest.fixture(
    params=["cpp", "reference", pytest.param("emulator,cpp", marks=pytest.mark.emulator)]
)
def kernels_or_not(request):
    """emulator: the CUDA solvers, which the family's every-op sizes run as far as rounding is not
    amplified."""
    with dashpot.backend(request.param):
        yield


def points(m, n, seed=0, dtype=D):
    """The specification's baseline: squared distances of two clouds."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((m, 2)), random.standard_normal((n, 2)) + 1
    return torch.from_numpy(((x[:, None] - y) ** 2).sum(-1)).to(dtype)


def experts(dtype=D):
    """The specification's router: 1024 tokens, 32 experts."""
    z = np.random.default_rng(1).standard_normal((1024, 32))
    e = np.exp(z)
    cost = torch.from_numpy(-e / e.sum(1, keepdims=True)).to(dtype)
    return cost, torch.ones(1024, dtype=dtype), torch.full((32,), 32.0, dtype=dtype)


# --------------------------------------------------------------------------------------------
# The specification's vectors


@pytest.mark.usefixtures("kernels_or_not")
class TestVectors:
    """Its third and fourth."""

    @pytest.mark.parametrize("solver", ["auto", "lbfgs"])
    @pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
    def test_sparse(self, solver, formulation):
        out = F.regularized_ot(
            COST, gamma=2.5, max_nz=3, tol=1e-11, solver=solver, formulation=formulation,
            plan="dense",
        )  # fmt: skip
        assert out.value.item() == pytest.approx(0.43696189394, abs=1e-10)
        column = [0.1115151515, 0, 0.0459696970, 0.0425151515]
        np.testing.assert_allclose(out.plan[:, 0].numpy(), column, atol=1e-8)
        centred = out.alpha - out.alpha.mean()
        want = [0.134375, -0.0667613636, -0.1194886364, 0.051875]
        np.testing.assert_allclose(centred.numpy(), want, atol=1e-8)
        assert (out.plan > 0).sum(0).tolist() == [3, 3, 3, 2, 3]
        assert out.status.item() == 0 and out.row_error[0] < 1e-9 and out.tied.item() == 0

    @pytest.mark.parametrize("solver", ["auto", "lbfgs"])
    def test_l2(self, solver):
        out = F.regularized_ot(COST, gamma=2.5, reg="l2", tol=1e-10, solver=solver)
        assert out.value.item() == pytest.approx(0.43692613043, abs=1e-10)

    @pytest.mark.parametrize("solver", ["auto", "sinkhorn", "lbfgs"])
    def test_negentropy(self, solver):
        out = F.regularized_ot(COST, gamma=0.1, reg="negentropy", tol=1e-10, solver=solver)
        assert out.value.item() == pytest.approx(0.07047887952, abs=1e-10)

    def test_gradient_through_the_plan(self):
        weight = torch.tensor(
            [[1, 0, 2, 0, 1], [0, 1, 0, -1, 0], [1, 1, 0, 0, -2], [0, 0, 1, 1, 0]], dtype=D
        )
        cost = COST.clone().requires_grad_()
        out = F.regularized_ot(
            cost, gamma=2.5, max_nz=3, tol=1e-12, plan="dense", differentiable="plan"
        )
        loss = (out.plan * weight).sum()
        loss.backward()
        assert loss.item() == pytest.approx(0.3554242424, abs=1e-9)
        first = [0.1696969697, 0, -0.2666666667, 0, 0.0969696970]
        last = [-0.0303030303, 0.1333333333, 0, 0, -0.1030303030]
        np.testing.assert_allclose(cost.grad[0].numpy(), first, atol=1e-8)
        np.testing.assert_allclose(cost.grad[3].numpy(), last, atol=1e-8)


@pytest.mark.usefixtures("kernels_or_not")
class TestNewton:
    @pytest.mark.parametrize(("reg", "k"), [("l2", None), ("sparse", 24)])
    def test_reaches_rounding(self, reg, k):
        """A small gamma: L-BFGS needs thousands of steps for less."""
        cost = points(24, 24)
        out = F.regularized_ot(cost, reg=reg, max_nz=k, solver="newton", tol=1e-12)
        assert out.status.item() == 0 and out.row_error[0].item() < 1e-12
        assert out.n_iter.item() < 60
        same = F.regularized_ot(cost, reg=reg, max_nz=k, solver="lbfgs", tol=1e-9, max_iter=3000)
        assert out.value.item() == pytest.approx(same.value.item(), abs=1e-9)
        assert out.value.item() >= same.value.item() - 1e-12

    def test_every_problem_of_a_batch_has_its_own_strength(self):
        """Scales of the cost a thousand apart: one needs the fall of gamma, the other does not."""
        cost = torch.stack([points(12, 15), 1e-3 * points(12, 15, seed=1), points(12, 15, seed=2)])
        cost[2, 0, 1:4] = torch.inf
        together = F.regularized_ot(cost, reg="l2", solver="newton", tol=1e-11)
        assert (together.status == 0).all() and (together.row_error[:, 0] < 1e-11).all()
        for i in range(3):
            alone = F.regularized_ot(cost[i], reg="l2", solver="newton", tol=1e-11)
            assert alone.value.item() == pytest.approx(together.value[i].item(), abs=1e-10)

    def test_a_start_that_is_near_is_kept(self):
        cost = points(24, 24)
        first = F.regularized_ot(cost, reg="l2", solver="newton", tol=1e-12)
        again = F.regularized_ot(
            cost + 1e-4 * points(24, 24, seed=3), reg="l2", solver="newton", tol=1e-11,
            init=first.alpha,
        )  # fmt: skip
        assert again.status.item() == 0 and again.n_iter.item() < first.n_iter.item() / 2

    def test_rows_of_the_cost_may_lie_either_way(self):
        cost = points(20, 13)
        wide = F.regularized_ot(cost, reg="l2", solver="newton", tol=1e-11, sparse_dim=-1)
        same = F.regularized_ot(cost.mT, reg="l2", solver="newton", tol=1e-11)
        assert wide.value.item() == pytest.approx(same.value.item(), abs=1e-10)
        assert wide.status.item() == same.status.item() == 0

    @pytest.mark.parametrize("gamma", [1e-7, 1e-3, 10.0])
    def test_a_small_gamma_is_the_assignment(self, gamma):
        """The support falls apart into trees; the value is within gamma |T|^2 / 2 of the least.
        Scores of 10 are rounded to 1e-15, a plan to 1e-15 / gamma, which ends the steps."""
        cost, tol = points(15, 15), 1e-11
        out = F.regularized_ot(cost, reg="l2", gamma=gamma, solver="newton", tol=tol)
        assert out.status.item() == (0 if gamma > 1e-4 else 2) and out.n_iter.item() < 150
        assert out.row_error[0].item() < max(tol, 1e-12 / gamma)
        least = cost.numpy()[linear_sum_assignment(cost)].mean()
        assert -1e-6 <= out.value.item() - least <= gamma / 2 / 15 + 1e-6

    def test_steps_are_bounded(self):
        out = F.regularized_ot(points(24, 24), reg="l2", solver="newton", tol=1e-12, max_iter=3)
        assert out.n_iter.item() == 3 and out.status.item() == 1

    def test_auto_solves_without_the_bound_first(self):
        """Where no column's support exceeds k that is the solution; else a start beside it."""
        cost = points(24, 24)
        free = F.regularized_ot(cost, reg="l2", solver="newton", tol=1e-10, plan="dense")
        widest = int((free.plan > 0).sum(0).max())
        inactive = F.regularized_ot(cost, max_nz=widest, tol=1e-10)
        assert inactive.status.item() == 0
        assert inactive.value.item() == pytest.approx(free.value.item(), abs=1e-12)
        assert inactive.n_iter.item() <= free.n_iter.item() + 1
        active = F.regularized_ot(cost, max_nz=1, tol=1e-10)
        alone = F.regularized_ot(cost, max_nz=1, tol=1e-10, solver="lbfgs", max_iter=3000)
        assert active.value.item() >= alone.value.item() - 1e-9


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize(
    ("m", "n"),
    # a single row or column; more columns or rows; a dense system of as many rows as are solved
    # directly, of more, which conjugate gradients take
    [(1, 9), (9, 1), (20, 90), (90, 20), (128, 70), (190, 150)],
)
def test_newton_of_every_shape(m, n, dtype):
    """Large and small gamma: wide supports and nearly trees. Masses that are not even."""
    random = np.random.default_rng(m)
    a, b = (torch.from_numpy(random.random(count) + 0.2) for count in (m, n))
    a, b = a / a.sum(), b / b.sum()
    for gamma in (0.5, 50.0):
        options = {"reg": "l2", "solver": "newton", "gamma": gamma, "max_iter": 1000}
        want = F.regularized_ot(points(m, n), a, b, tol=1e-10, **options)
        assert want.status.item() == 0 and want.row_error[0].item() < 1e-10
        cost, tol = points(m, n, dtype=dtype), 1e-10 if dtype == D else 1e-4
        out = F.regularized_ot(cost, a.to(dtype), b.to(dtype), tol=tol, **options)
        assert out.status.item() == 0 and out.row_error[0].item() < tol
        with dashpot.backend("reference"):
            same = F.regularized_ot(points(m, n), a, b, tol=1e-9, **options)
        rounding = 1e-9 if dtype == D else 1e-5
        assert out.value.item() == pytest.approx(same.value.item(), rel=rounding)


@pytest.mark.parametrize("size", [3, 4, 5, 15, 16, 17, 31, 32, 63, 64, 65, 128])
def test_dense_systems_of_every_instruction_set(size):
    """A large gamma, every pair in the plan: all rows in the dense system, of sizes at the ends of
    vectors and panels. At a small one lists of every length, from words that are not whole. A line
    search makes up for a wrong step, which more steps betray."""
    best = ("baseline", "avx2", "avx512").index(_C.cpu_isa())
    cost = points(size, size + 3)
    for gamma, steps in ((2e4, 7), (0.5, 100)):
        options = {"reg": "l2", "solver": "newton", "gamma": gamma, "max_iter": 300, "tol": 1e-11}
        with dashpot.backend("reference"):
            want = F.regularized_ot(cost, **options)
        try:
            for instructions in ("baseline", "avx2", "avx512")[: best + 1]:
                _C.set_cpu_isa(instructions)
                out = F.regularized_ot(cost, **options)
                turned = F.regularized_ot(cost.T.contiguous(), sparse_dim=-1, **options)
                assert out.status.item() == 0 and out.row_error[0].item() < 1e-11
                assert out.value.item() == pytest.approx(want.value.item(), rel=1e-11)
                assert out.n_iter.item() <= steps
                assert torch.equal(out.alpha, turned.beta) and torch.equal(out.beta, turned.alpha)
        finally:
            _C.set_cpu_isa(None)


def test_newton_of_no_mass():
    out = F.regularized_ot(points(4, 3), torch.zeros(4, dtype=D), torch.zeros(3, dtype=D), reg="l2")
    assert out.status.item() == 0 and out.value.item() == 0


def test_equals_the_search_over_supports():
    """Two columns of three rows, at most two entries each: every support, solved as l2."""
    cost = points(3, 2)
    a, b = torch.full((3,), 1 / 3, dtype=D), torch.full((2,), 1 / 2, dtype=D)
    out = F.regularized_ot(cost, gamma=1.0, max_nz=2, tol=1e-10, plan="dense")
    best = float("inf")
    for supports in itertools.product(itertools.combinations(range(3), 2), repeat=2):
        closed = torch.full_like(cost, torch.inf)
        for j, rows in enumerate(supports):
            closed[list(rows), j] = cost[list(rows), j]
        tried = F.regularized_ot(closed, a, b, reg="l2", gamma=1.0, tol=1e-10)
        if tried.status.item() == 0:
            best = min(best, tried.value.item())
    assert out.value.item() <= best + 1e-9  # weak duality against every support
    if out.tied.item() == 0 and out.status.item() == 0:
        assert out.value.item() == pytest.approx(best, abs=1e-8)


# --------------------------------------------------------------------------------------------
# Against the published figures and POT


@pytest.mark.parametrize(
    ("k", "best"), [(32, 342.27410), (36, 290.17197), (48, 189.41532), (64, 114.59603)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reaches_the_best_known_value_of_the_router(k, best, dtype):
    """Kinks from the first steps on: L-BFGS alone stops short of them."""
    out = F.regularized_ot(*experts(dtype), max_nz=k)
    assert out.value.item() >= best - 1e-4
    assert out.value.item() <= best + 0.01  # concave: nothing can lie far above
    assert out.col_error.abs().max().item() < 1e-3


@pytest.mark.parametrize(
    ("size", "k", "value", "row_error"), [(64, 2, 1.829476, 2.3e-2), (64, 8, 1.829445, 2.4e-4)]
)
def test_no_worse_than_the_table(size, k, value, row_error):
    out = F.regularized_ot(points(size, size), max_nz=k)
    assert out.value.item() >= value - 1e-6
    assert out.row_error[0].item() <= row_error


@pytest.mark.peers
@pytest.mark.parametrize(("m", "n", "k"), [(40, 40, 2), (40, 40, 6), (96, 12, 12)])
def test_no_worse_than_pot(m, n, k):
    cost = points(m, n, seed=3)
    a, b = torch.full((m,), 1 / m, dtype=D), torch.full((n,), 1 / n, dtype=D)
    smooth = peers.load("ot.smooth")
    regularizer = smooth.SparsityConstrained(gamma=1.0, max_nz=k)
    alpha, _ = smooth.solve_semi_dual(
        a.numpy(), b.numpy(), cost.numpy(), regularizer, tol=1e-9, max_iter=500
    )
    theirs, _ = smooth.semi_dual_obj_grad(alpha, a.numpy(), b.numpy(), cost.numpy(), regularizer)
    assert F.regularized_ot(cost, max_nz=k).value.item() >= theirs - 1e-9


# --------------------------------------------------------------------------------------------
# Properties


@given(st.integers(0, 10**6), st.sampled_from(EVERY), st.integers(2, 9), st.integers(2, 9))
@settings(max_examples=20)
def test_duality_and_marginals(seed, reg, m, n):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(m, n, generator=generator, dtype=D)
    a, b = (torch.rand(s, generator=generator, dtype=D) + 0.1 for s in (m, n))
    a, b = a / a.sum() * 3, b / b.sum() * 3
    name, k = reg
    out = F.regularized_ot(cost, a, b, reg=name, max_nz=k, gamma=0.7, plan="dense", tol=1e-9)
    torch.testing.assert_close(out.plan.sum(0), b, rtol=1e-6, atol=1e-9)
    assert k is None or int((out.plan > 0).sum(0).max()) <= k
    gap = (out.alpha * (out.plan.sum(1) - a)).sum()
    torch.testing.assert_close(out.gap, gap, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        out.row_error[0], (out.plan.sum(1) - a).abs().sum(), rtol=1e-4, atol=1e-7
    )
    dual, _, columns = F.ot_dual_value_grad(
        out.alpha, out.beta, cost, a, b, reg=name, gamma=0.7, max_nz=k
    )
    torch.testing.assert_close(dual, out.value)  # D(alpha, beta(alpha)) = Q(alpha)
    assert columns.abs().max() < 1e-6


@given(st.integers(0, 10**6), st.sampled_from(EVERY))
@settings(max_examples=10)
def test_permutations_move_the_plan(seed, reg):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(6, 5, generator=generator, dtype=D)
    rows, columns = (torch.randperm(s, generator=generator) for s in (6, 5))
    name, k = reg
    options = {"reg": name, "max_nz": k, "tol": 1e-10, "plan": "dense", "max_iter": 2000}
    one = F.regularized_ot(cost, **options)
    two = F.regularized_ot(cost[rows][:, columns], **options)
    torch.testing.assert_close(one.value, two.value, rtol=1e-7, atol=1e-8)
    if one.status.item() == 0 and two.status.item() == 0:
        torch.testing.assert_close(one.plan[rows][:, columns], two.plan, rtol=1e-4, atol=1e-6)


def test_k_of_a_whole_column_is_l2():
    cost = points(12, 10)
    sparse, l2 = F.regularized_ot(cost, max_nz=99), F.regularized_ot(cost, reg="l2")
    assert torch.equal(sparse.value, l2.value) and torch.equal(sparse.alpha, l2.alpha)


def test_one_nonzero_is_the_assignment():
    """k = 1: the unregularised semi-dual plus gamma / 2 sum b^2."""
    cost = torch.tensor([[0.0, 1, 2], [3, 0, 1], [2, 4, 0]], dtype=D)
    out = F.regularized_ot(cost, max_nz=1, plan="dense")
    torch.testing.assert_close(out.plan, torch.eye(3, dtype=D) / 3)
    assert out.value.item() == pytest.approx(0.5 / 3, abs=1e-9)


@pytest.mark.parametrize("reg", EVERY)
def test_a_batch_is_its_problems(reg):
    """Each stops by itself: different iterations, the same bits as alone."""
    name, k = reg
    cost = torch.stack([points(20, 16, seed=s) * (s + 1) for s in range(6)]).view(2, 3, 20, 16)
    out = F.regularized_ot(cost, reg=name, max_nz=k)
    assert out.value.shape == (2, 3) and out.row_error.shape == (2, 3, 2)
    assert out.n_iter.unique().numel() > 1
    for i, j in itertools.product(range(2), range(3)):
        alone = F.regularized_ot(cost[i, j], reg=name, max_nz=k)
        assert torch.equal(alone.alpha, out.alpha[i, j])
        assert alone.n_eval == out.n_eval[i, j]


@pytest.mark.parametrize("reg", EVERY)
@pytest.mark.parametrize("formulation", ["semi_dual", "dual"])
def test_rows_and_columns_exchange(reg, formulation):
    name, k = reg
    cost = points(17, 13)
    options = {
        "reg": name, "max_nz": k, "plan": "dense", "formulation": formulation, "tol": 1e-7
    }  # fmt: skip
    rows = F.regularized_ot(cost, sparse_dim=-1, **options)
    columns = F.regularized_ot(cost.T.contiguous(), **options)
    assert torch.equal(rows.value, columns.value)
    assert torch.equal(rows.plan, columns.plan.T)
    assert torch.equal(rows.alpha, columns.beta) and torch.equal(rows.beta, columns.alpha)
    assert torch.equal(rows.row_error, columns.col_error)


def test_candidate_lists_change_nothing():
    """512 rows, k = 4: lists of 64 with certificates, against evaluations of the whole cost."""
    cost = points(512, 96)
    b = torch.full((96,), 1 / 96, dtype=D)
    out = F.regularized_ot(cost, max_nz=4, solver="lbfgs", max_iter=60)
    value, *_ = F.ot_semidual_value_grad(out.alpha, cost, None, b, max_nz=4)
    assert out.value.item() == pytest.approx(value.item(), abs=1e-12)
    with dashpot.backend("reference"):
        same = F.regularized_ot(cost, max_nz=4, solver="lbfgs", max_iter=8)
    fast = F.regularized_ot(cost, max_nz=4, solver="lbfgs", max_iter=8)
    torch.testing.assert_close(fast.alpha, same.alpha, rtol=1e-9, atol=1e-12)
    assert fast.n_eval == same.n_eval


@pytest.mark.parametrize("smoothing", [1e-3, 1e-5])
def test_smoothing_reports_the_function_itself(smoothing):
    cost, a, b = experts()
    out = F.regularized_ot(cost, a, b, max_nz=48, smoothing=smoothing, max_iter=200)
    value, *_ = F.ot_semidual_value_grad(out.alpha, cost, a, b, max_nz=48)
    assert out.value.item() == pytest.approx(value.item(), abs=1e-9)
    assert 189.0 < out.value.item() < 189.42


# --------------------------------------------------------------------------------------------
# Traps


@pytest.mark.usefixtures("kernels_or_not")
class TestTraps:
    @pytest.mark.parametrize("reg", EVERY)
    def test_forbidden_pairs_hold_nothing(self, reg):
        name, k = reg
        cost = points(8, 8)
        cost[0, :4] = torch.inf
        cost[3, 5] = torch.inf
        out = F.regularized_ot(cost, reg=name, max_nz=k, plan="dense", max_iter=2000)
        assert bool(out.plan.isfinite().all()) and not bool(out.plan[cost.isinf()].any())
        assert out.row_error[0] < 0.1

    @pytest.mark.parametrize("axis", [0, 1])
    def test_a_closed_row_or_column_is_infeasible(self, axis):
        cost = points(6, 6)
        cost.select(axis, 2).fill_(torch.inf)
        out = F.regularized_ot(cost, max_nz=2, max_iter=50)
        assert out.status.item() == 3
        assert out.value.isfinite().all() and out.plan.values.isfinite().all()

    def test_too_few_places_are_infeasible(self):
        assert F.regularized_ot(points(9, 4), max_nz=2, max_iter=20).status.item() == 3

    @pytest.mark.parametrize("reg", EVERY)
    def test_rows_and_columns_without_mass(self, reg):
        name, k = reg
        a = torch.tensor([0.0, 0.5, 0.3, 0.2, 0.0], dtype=D)
        b = torch.tensor([0.4, 0.0, 0.6], dtype=D)
        out = F.regularized_ot(
            points(5, 3), a, b, reg=name, max_nz=k, plan="dense", tol=1e-9, max_iter=3000
        )
        assert out.status.item() == 0
        torch.testing.assert_close(out.plan.sum(1), a, rtol=0, atol=1e-7)
        torch.testing.assert_close(out.plan.sum(0), b, rtol=0, atol=1e-7)

    def test_kinks_are_told(self):
        """The same column twice, k = 1: the rows tie at the optimum."""
        cost = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0]], dtype=D)
        out = F.regularized_ot(cost, max_nz=1, max_iter=100)
        assert out.tied.item() == 2 and out.status.item() != 0 and out.row_error[0] > 0.5


def test_masses_need_not_sum_to_one():
    cost = points(10, 10)
    one = F.regularized_ot(cost, reg="l2", gamma=1.0, plan="dense", tol=1e-9)
    mass = torch.full((10,), 0.7, dtype=D)
    seven = F.regularized_ot(cost, mass, mass, reg="l2", gamma=1 / 7, plan="dense", tol=1e-9)
    torch.testing.assert_close(seven.plan, 7 * one.plan, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_rounds_the_cost_once(dtype):
    cost = points(24, 20, dtype=dtype)
    out = F.regularized_ot(cost, max_nz=6)
    same = F.regularized_ot(cost.float(), max_nz=6)
    assert out.value.dtype == torch.float32
    assert torch.equal(out.value, same.value)


def test_any_number_of_threads_gives_the_same_bits():
    cost, seen = points(300, 260), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(F.regularized_ot(cost, max_nz=3, max_iter=30))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(seen[0].alpha, one.alpha) for one in seen)


# --------------------------------------------------------------------------------------------
# Plans


@pytest.mark.parametrize("sparse_dim", [-2, -1])
def test_every_form_of_a_plan(sparse_dim):
    cost = points(9, 7)
    dense, coo, csc, topk = (
        F.regularized_ot(cost, max_nz=3, plan=plan, sparse_dim=sparse_dim).plan
        for plan in ("dense", "coo", "csc", "topk")
    )
    assert coo.layout == torch.sparse_coo and csc.layout == torch.sparse_csc
    for other in (coo.to_dense(), csc.to_dense(), topk.to_dense()):
        assert torch.equal(other, dense)
    np.testing.assert_array_equal(topk.to_scipy().toarray(), dense.numpy())
    assert topk.nnz().item() == int((dense > 0).sum())
    shape = (3, 7) if sparse_dim == -2 else (9, 3)
    assert topk.values.shape == topk.indices.shape == shape and topk.indices.dtype == torch.int32
    assert F.regularized_ot(cost, max_nz=3, plan=None).plan is None


def test_plans_of_a_batch():
    cost = points(9, 7).expand(2, 9, 7)
    out = F.regularized_ot(cost, max_nz=3, plan="coo")
    assert out.plan.shape == (2, 9, 7)
    with pytest.raises(ValueError, match="csc holds one problem"):
        F.regularized_ot(cost, max_nz=3, plan="csc")
    with pytest.raises(ValueError, match="expected one problem"):
        F.regularized_ot(cost, max_nz=3).plan.to_scipy()


# --------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("reg", EVERY)
@pytest.mark.parametrize("sparse_dim", [-2, -1])
def test_envelope(reg, sparse_dim):
    """dV/dC = T, and of masses up to a constant: their total is held."""
    name, k = reg
    a = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=D)
    b = torch.full((5,), 0.2, dtype=D)

    def value(cost, x, y):
        masses = (m / m.sum() for m in (x, y))
        return F.regularized_ot(
            cost, *masses, reg=name, gamma=2.5, max_nz=k, tol=1e-13, max_iter=5000,
            sparse_dim=sparse_dim, plan=None,
        ).value  # fmt: skip

    inputs = [t.clone().requires_grad_() for t in (COST, a, b)]
    assert torch.autograd.gradcheck(value, inputs, eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("reg", EVERY)
def test_through_the_plan(reg):
    name, k = reg

    def plan(cost, x, y):
        masses = (m / m.sum() for m in (x, y))
        return F.regularized_ot(
            cost, *masses, reg=name, gamma=2.5, max_nz=k, tol=1e-13, max_iter=5000, plan="dense",
            differentiable="plan",
        ).plan  # fmt: skip

    a = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=D)
    b = torch.full((5,), 0.2, dtype=D)
    inputs = [t.clone().requires_grad_() for t in (COST, a, b)]
    assert torch.autograd.gradcheck(plan, inputs, eps=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    cost = COST.clone().requires_grad_()
    value = F.regularized_ot(cost, max_nz=3).value
    (grad,) = torch.autograd.grad(value, cost, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_no_gradient_is_asked_for():
    cost = COST.clone().requires_grad_()
    out = F.regularized_ot(cost, max_nz=3, differentiable=None)
    assert not out.value.requires_grad
    out = F.regularized_ot(cost, max_nz=3)
    assert out.value.requires_grad and not out.plan.values.requires_grad


def test_compiles_in_one_graph():
    compiled = torch.compile(
        lambda cost: F.regularized_ot(cost, max_nz=3, solver="adam", max_iter=20).plan.values,
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    cost = points(12, 10, dtype=torch.float32)
    want = F.regularized_ot(cost, max_nz=3, solver="adam", max_iter=20).plan.values
    assert torch.equal(compiled(cost), want)


# --------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg": "kl"}, "reg: expected one of"),
        ({"max_nz": 0}, "max_nz: expected at least 1, got 0"),
        ({"max_nz": None}, "max_nz: expected an int"),
        ({"gamma": 0.0}, "gamma: expected a positive"),
        ({"sparse_dim": 0}, "sparse_dim: expected -2 or -1, got 0"),
        ({"formulation": "primal"}, "formulation: expected"),
        ({"solver": "simplex"}, "solver: expected one of"),
        ({"solver": "sinkhorn"}, 'solver: "sinkhorn" is for reg="negentropy"'),
        ({"solver": "newton"}, 'solver: "newton" is for'),
        ({"max_iter": 0}, "max_iter: expected an int of at least 1, got 0"),
        ({"tol": -1.0}, "tol: expected a number of at least 0"),
        ({"smoothing": 0.1, "reg": "l2", "max_nz": None}, "smoothing: expected 0"),
        ({"plan": "csr"}, "plan: expected one of"),
        ({"differentiable": "yes"}, "differentiable: expected"),
        ({"a": torch.ones(3, dtype=D)}, "a: expected"),
        ({"a": torch.full((4,), 0.5, dtype=D)}, "b: expected the total of a"),
        ({"a": torch.tensor([-1.0, 1, 1, 0], dtype=D)}, "a: expected masses of at least 0"),
        ({"init": torch.zeros(3, dtype=D)}, "init: expected alpha"),
    ],
)
def test_errors(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        F.regularized_ot(COST, **{"max_nz": 2, **options})


def test_nan_cost_is_an_error():
    cost = COST.clone()
    cost[1, 1] = torch.nan
    with pytest.raises(ValueError, match="cost: expected numbers or \\+inf, got NaN"):
        F.regularized_ot(cost, max_nz=2)
