"""The op `ot_plan`: the transport plan of given potentials, its nonzeros only."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.transport._problem import (
    as_problem,
    cost_floor,
    points_cost,
    random_points,
    random_problem,
    top_sorted,
)
from dashpot.transport.plans import TopKPlan
from dashpot.transport.sparse_simplex_projection import threshold


def _ot_plan_reference(
    cost: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, by_rows: bool, reg: str, gamma: float,
    max_nz: int, formulation: str, y: Tensor | None, metric: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k largest entries of each column of T, descending, of equals the lowest row first.

    cost (B, m, n), with by_rows (B, n, m), or x (B, m, d) with y (B, n, d) and a metric; alpha
    (B, m), b, beta (B, n) -> rows int32 and values (B, k, n). Places beyond a column's nonzeros:
    row -1, value 0. semi_dual: the column's own threshold (its sum is b); dual: beta. Negative
    entropy and no bound: every row, in its order.
    """
    cost = cost if y is None else points_cost(cost, y, metric)
    wide = (cost.mT if by_rows else cost).to(alpha.dtype)
    s = alpha[:, :, None] - wide  # (B, m, n)
    dual = formulation == "dual"
    if reg == "negentropy":
        if dual:
            t = torch.exp((s + beta[:, None]) / gamma - 1)
        else:
            t = torch.softmax(s / gamma, 1) * b[:, None]
            t = torch.where(b[:, None] > 0, t.nan_to_num(0.0), 0)
        rows = torch.arange(t.shape[1], device=t.device, dtype=torch.int32)[:, None]
        return rows.expand(t.shape).contiguous(), t
    top, rows = top_sorted(s, max_nz)  # (B, k, n)
    theta = -beta if dual else threshold(top, gamma * b)  # (B, n)
    t = torch.where(top > theta[:, None], (top - theta[:, None]) / gamma, 0)
    return torch.where(t > 0, rows, -1).int(), t


def _ot_plan_fake(cost, b, alpha, beta, by_rows, reg, gamma, max_nz, *_):
    shape = (b.shape[0], max_nz, b.shape[1])
    return alpha.new_empty(shape, dtype=torch.int32), alpha.new_empty(shape)


def _ot_plan_inputs(size, dtype, device, seed):
    """size (B, k or a regulariser's name, m, n), or of points (B, k, metric, d, m, n)."""
    if len(size) == 6:
        batch, k, metric, *shape = size
        x, y, _, b, alpha, beta, reg, k = random_points((batch, k, *shape), dtype, device, seed)
        return x, b, alpha, beta, False, reg, 0.5, k, "semi_dual", y, metric
    cost, _, b, alpha, beta, reg, k = random_problem(size, dtype, device, seed)
    return cost, b, alpha, beta, False, reg, 0.5, k, "semi_dual", None, ""


def _ot_plan_floor(cost, b, alpha, beta, by_rows, reg, gamma, max_nz, formulation, y, metric):
    """One read of the cost or the points, one write of the places."""
    places = b.numel() * max_nz * (4 + alpha.element_size())
    flops, read = cost_floor(cost, b, y)
    return read + places + alpha.nbytes + 2 * b.nbytes, flops


OT_PLAN = declare(
    "ot_plan",
    forward="(Tensor cost, Tensor b, Tensor alpha, Tensor beta, bool by_rows, str reg, float gamma,"
    " int max_nz, str formulation, Tensor? y, str metric) -> (Tensor rows, Tensor values)",
    reference=_ot_plan_reference,
    fake=_ot_plan_fake,
    inputs=_ot_plan_inputs,
    floor=_ot_plan_floor,
    sizes={"test": [(1, 1, 1, 1), (2, 2, 6, 5), (3, 8, 40, 37), (2, 20, 70, 33),
                    (2, "l2", 40, 37), (2, "negentropy", 33, 37), (2, 3, "euclidean", 5, 40, 37)],
           "bench": [(1, 8, 512, 512), (1, 48, 1024, 32)]},
)  # fmt: skip


@public
def ot_plan(
    alpha: Tensor,
    cost: Tensor,
    b: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    reg: Literal["negentropy", "l2", "sparse"] = "sparse",
    gamma: float = 1.0,
    max_nz: int | None = None,
) -> TopKPlan:
    r"""The transport plan that belongs to potentials, as the nonzeros of its columns.

    Without beta the semi-dual's: :math:`t_j = \arg\max \{t\cdot s_j - \Omega(t): t \ge 0,
    \sum t = b_j\ (, \|t\|_0 \le k)\}`, :math:`s_{ij} = \alpha_i - C_{ij}`, whose column sums are
    exact; with beta the dual's, :math:`t_j = \nabla\Omega^+(s_j + \beta_j)`.

    Args:
        alpha: (..., m) potentials of the rows.
        cost: (..., m, n) float64, float32, bfloat16, float16; +inf forbids a pair. Read once.
        b: (..., n) column masses; None: uniform, sum 1. The dual has no use for them.
        beta: (..., n) potentials of the columns: the dual's plan; None: the semi-dual's.
        reg, gamma, max_nz: as in `ot_semidual_value_grad`.

    Returns:
        `TopKPlan`: indices int32 and values (..., k, n), of each column the largest first (of
        negative entropy all rows in their order), -1 and 0 where there are fewer.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    No gradient flows; `regularized_ot(..., differentiable="plan")` has one.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    form = "semi_dual" if beta is None else "dual"
    extra = {} if beta is None else {"beta": (beta, -1)}
    problem = as_problem(cost, None, b, reg, gamma, max_nz, alpha=(alpha, -2), **extra)
    columns = problem.potentials[1] if extra else torch.zeros_like(problem.b)
    rows, values = OT_PLAN(
        problem.cost, problem.b, problem.potentials[0], columns, False, reg, problem.gamma,
        problem.k, form, None, "",
    )  # fmt: skip
    m, n = cost.shape[-2:]
    shape = (*problem.batch, problem.k, n)
    return TopKPlan(rows.reshape(shape), values.reshape(shape), m, n)
