"""The op `ot_plan`: the plan that belongs to potentials."""

import pytest
import torch
from dashpot import functional as F
from dashpot.transport.ot_plan import OT_PLAN

pytestmark = pytest.mark.usefixtures("backend64")


def plan(cost, b, alpha, beta=None, by_rows=False, reg="sparse", gamma=0.5, k=2, form="semi_dual"):
    beta = torch.zeros_like(b) if beta is None else beta
    rows, values = OT_PLAN(
        cost[None], b[None], alpha[None], beta[None], by_rows, reg, gamma, k, form, None, ""
    )
    return rows[0], values[0]


def dense(rows, values, m):
    full = values.new_zeros(m, values.shape[1])
    return full.scatter_add(0, rows.clamp(min=0).long(), values)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_columns_are_exact_and_sparse(spec_problem, k):
    problem = spec_problem()
    rows, values = plan(problem["cost"], problem["b"], problem["alpha"], k=k)
    torch.testing.assert_close(values.sum(0), problem["b"])
    assert rows.shape == (k, 3) and bool(((rows >= 0) == (values > 0)).all())
    assert bool((values[:-1] >= values[1:]).all())


def test_semi_dual_plan_is_the_gradient(spec_problem):
    """The specification's second vector: a - T 1."""
    problem = spec_problem()
    rows, values = plan(problem["cost"], problem["b"], problem["alpha"], k=1)
    want = torch.tensor([-0.2, -0.05, 0.15, 0.1], dtype=torch.float64)
    torch.testing.assert_close(problem["a"] - dense(rows, values, 4).sum(1), want)


def test_dual_plan_is_the_gradient(spec_problem):
    problem = spec_problem()
    rows, values = plan(
        problem["cost"], problem["b"], problem["alpha"], problem["beta"], k=1, form="dual"
    )
    want = torch.tensor([-0.9, -0.5, -0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(problem["a"] - dense(rows, values, 4).sum(1), want)


@pytest.mark.parametrize("reg", ["sparse", "l2", "negentropy"])
@pytest.mark.parametrize("form", ["semi_dual", "dual"])
def test_by_rows_reads_the_cost_as_it_lies(spec_problem, reg, form):
    problem = spec_problem()
    k = 2 if reg == "sparse" else 4
    args = problem["b"], problem["alpha"], problem["beta"]
    got = plan(problem["cost"].T.contiguous(), *args, by_rows=True, reg=reg, k=k, form=form)
    want = plan(problem["cost"], *args, reg=reg, k=k, form=form)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_ties_take_the_lowest_row():
    cost, b = torch.zeros(20, 3), torch.ones(3)
    rows, values = plan(cost, b, torch.zeros(20), k=3)
    assert rows.T.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(values, torch.full((3, 3), 1 / 3))


def test_columns_without_mass_and_forbidden_pairs_hold_nothing():
    cost, b = torch.rand(6, 3), torch.tensor([1.0, 0.0, 1.0])
    cost[:4, 2] = torch.inf
    rows, values = plan(cost, b, torch.zeros(6), k=3)
    assert not bool((values[:, 1] > 0).any()) and bool((rows[:, 1] == -1).all())
    assert bool((rows[:, 2][rows[:, 2] >= 0] >= 4).all())


@pytest.mark.parametrize("form", ["semi_dual", "dual"])
def test_public_function(spec_problem, form):
    problem = spec_problem()
    beta = problem["beta"] if form == "dual" else None
    got = F.ot_plan(problem["alpha"], problem["cost"], problem["b"], beta, gamma=0.5, max_nz=2)
    rows, values = plan(
        problem["cost"], problem["b"], problem["alpha"], problem["beta"], k=2, form=form
    )
    assert torch.equal(got.indices, rows) and torch.equal(got.values, values)
    torch.testing.assert_close(got.to_dense(), dense(rows, values, 4))


def test_errors(spec_problem):
    problem = spec_problem()
    with pytest.raises(ValueError, match="alpha: expected"):
        F.ot_plan(problem["alpha"][:2], problem["cost"], max_nz=2)
    with pytest.raises(ValueError, match="max_nz: expected an int"):
        F.ot_plan(problem["alpha"], problem["cost"])
