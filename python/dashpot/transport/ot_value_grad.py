"""The op `ot_value_grad`: an evaluation as solvers ask for it, of points and of the smoothed dual
too."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.transport._problem import (
    METRICS,
    as_problem,
    as_problem_of_points,
    cost_floor,
    points_cost,
    random_points,
    random_problem,
)
from dashpot.transport._reference_solve import smoothed_dual
from dashpot.transport.ot_dual_value_grad import _ot_dual_value_grad_reference
from dashpot.transport.ot_semidual_value_grad import _ot_semidual_value_grad_reference


def _ot_value_grad_reference(
    alpha: Tensor, beta: Tensor | None, cost: Tensor, y: Tensor | None, a: Tensor, b: Tensor,
    smoothing: Tensor | None, level: Tensor | None, metric: str, reg: str, gamma: float,
    max_nz: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The semi-dual (no beta), the dual, or the dual smoothed by smoothing (B,); see there.

    alpha, a (B, m), beta, b (B, n), cost (B, m, n), or x (B, m, d) with y (B, n, d) -> value (B,),
    a - T 1 (B, m), b - T^T 1 or beta (B, n), and of the smoothed dual its level (B, n), where a
    kernel's search for the next one starts.
    """
    cost = cost if y is None else points_cost(cost, y, metric)
    if beta is None:
        found = _ot_semidual_value_grad_reference(alpha, cost, a, b, reg, gamma, max_nz)
    elif smoothing is None:
        found = _ot_dual_value_grad_reference(alpha, beta, cost, a, b, reg, gamma, max_nz)
    else:
        s = alpha[:, :, None] + beta[:, None] - cost.to(alpha.dtype)  # (B, m, n)
        energy, plan, level = smoothed_dual(s, gamma, max_nz, smoothing[:, None, None])
        value = (a * alpha).sum(1) + (b * beta).sum(1) - energy.sum(1)
        return value, a - plan.sum(2), b - plan.sum(1), level
    return *found, b.new_zeros(b.shape[0], 0)


def _ot_value_grad_fake(alpha, beta, cost, y, a, b, smoothing, *_):
    places = b.shape if smoothing is not None else (b.shape[0], 0)
    return (
        alpha.new_empty(alpha.shape[:1]), torch.empty_like(alpha), torch.empty_like(b),
        b.new_empty(places),
    )  # fmt: skip


def _ot_value_grad_inputs(size, dtype, device, seed):
    """size (B, k or a regulariser's name, function, metric, d, m, n); no metric: a stored cost."""
    batch, k, function, metric, d, m, n = size
    if metric:
        x, y, a, b, alpha, beta, reg, k = random_points((batch, k, d, m, n), dtype, device, seed)
    else:
        x, a, b, alpha, beta, reg, k = random_problem((batch, k, m, n), dtype, device, seed)
        y = None
    smoothing = a.new_full((batch,), 0.05) if function == "smoothed" else None
    beta = None if function == "semi_dual" else beta
    return alpha, beta, x, y, a, b, smoothing, None, metric, reg, 0.5, k


def _ot_value_grad_floor(alpha, beta, cost, y, a, b, *_):
    """One read of the cost or of the points."""
    flops, read = cost_floor(cost, b, y)
    return read + 3 * (alpha.nbytes + b.nbytes), flops


OT_VALUE_GRAD = declare(
    "ot_value_grad",
    forward="(Tensor alpha, Tensor? beta, Tensor cost, Tensor? y, Tensor a, Tensor b,"
    " Tensor? smoothing, Tensor? level, str metric, str reg, float gamma, int max_nz)"
    " -> (Tensor obj, Tensor grad_alpha, Tensor column, Tensor level_out)",
    reference=_ot_value_grad_reference,
    fake=_ot_value_grad_fake,
    inputs=_ot_value_grad_inputs,
    floor=_ot_value_grad_floor,
    public=3,
    # one pair; the metrics in one, few and many dimensions; lists and thresholds; lanes' ends
    sizes={"test": [(1, 1, "semi_dual", "sqeuclidean", 1, 1, 1),
                    (2, 2, "semi_dual", "sqeuclidean", 1, 6, 5),
                    (2, 8, "dual", "euclidean", 3, 40, 37),
                    (2, 20, "semi_dual", "inner", 17, 70, 33),
                    (1, "l2", "semi_dual", "sqeuclidean", 3, 300, 50),
                    (1, "l2", "dual", "euclidean", 3, 40, 70),
                    (1, "negentropy", "semi_dual", "sqeuclidean", 33, 33, 37),
                    (2, 4, "smoothed", "", 0, 40, 37),
                    (2, 4, "smoothed", "sqeuclidean", 2, 45, 66)],
           "bench": [(1, 2, "semi_dual", "sqeuclidean", 3, 512, 512),
                     (1, 8, "smoothed", "", 0, 512, 512)]},
)  # fmt: skip


@public
def ot_value_grad(
    alpha: Tensor,
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    y: Tensor | None = None,
    metric: Literal["sqeuclidean", "euclidean", "inner"] = "sqeuclidean",
    reg: Literal["negentropy", "l2", "sparse"] = "sparse",
    gamma: float = 1.0,
    max_nz: int | None = None,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One evaluation of a regularised transport problem's semi-dual, dual or smoothed dual.

    What `ot_semidual_value_grad` and `ot_dual_value_grad` compute, also of a cost that is made from
    points on the fly and never stored, and of the dual whose choice of k entries is smoothed:
    :math:`\Omega^+(s) = \max\{\sum_i \theta_i [s_i]_+^2/(2\gamma) - \frac\mu2\theta_i^2 :
    0 \le \theta \le 1, \sum\theta \le k\}`, T = :math:`\theta [s]_+/\gamma`.

    Args:
        alpha: (..., m) potentials of the rows.
        cost: (..., m, n) float64, float32, bfloat16, float16; +inf forbids a pair. With y: the
            points x (..., m, d), read as float32 where they are shorter.
        a: (..., m) row masses; None: uniform, sum 1.
        b: (..., n) column masses; None: uniform, sum 1.
        beta: (..., n) potentials of the columns: the dual; None: the semi-dual.
        y: (..., n, d) points in the dtype of x; None: cost is a cost.
        metric: of the points: "sqeuclidean" :math:`|x-y|^2`, "euclidean" :math:`|x-y|`, "inner"
            :math:`-x\cdot y`.
        reg, gamma, max_nz: as in `ot_semidual_value_grad`.
        smoothing: mu of the smoothed dual ("sparse" with beta); 0: none.

    Returns:
        Value (...), gradient a - T 1 (..., m), and b - T^T 1 of the dual or beta of the semi-dual
        (..., n), in float32, or float64 where the cost or the points are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Memory is that of the inputs and of one tile of scores per thread. No gradient flows.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(smoothing, int | float) or not smoothing >= 0:
        raise ValueError(f"smoothing: expected a number of at least 0, got {smoothing!r}")
    if smoothing > 0 and (beta is None or reg != "sparse"):
        raise ValueError(
            f'smoothing: expected 0 but for reg="sparse" with beta, got {smoothing} for '
            f"reg={reg!r}, beta={'None' if beta is None else 'given'}"
        )
    potentials = {"alpha": (alpha, -2)} | ({} if beta is None else {"beta": (beta, -1)})
    if y is None:
        problem = as_problem(cost, a, b, reg, gamma, max_nz, **potentials)
    else:
        problem, y = as_problem_of_points(cost, y, a, b, reg, gamma, max_nz, **potentials)
    rows, *columns = problem.potentials
    mu = rows.new_full(rows.shape[:1], smoothing) if smoothing > 0 else None
    obj, grad, column = OT_VALUE_GRAD(
        rows, columns[0] if columns else None, problem.cost, y, problem.a, problem.b, mu, None,
        metric if y is not None else "", reg, problem.gamma, problem.k,
    )  # fmt: skip
    shape = (*problem.batch, column.shape[1])
    return obj.view(problem.batch), grad.view(alpha.shape), column.view(shape)
