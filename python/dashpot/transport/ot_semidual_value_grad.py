"""The op `ot_semidual_value_grad`: one evaluation of the semi-dual, in one read of the cost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.transport._problem import as_problem, random_problem, state_dtype, top_sorted
from dashpot.transport.sparse_simplex_projection import threshold


def _ot_semidual_value_grad_reference(
    alpha: Tensor, cost: Tensor, a: Tensor, b: Tensor, reg: str, gamma: float, max_nz: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Q = a.alpha - sum_j max {t.s_j - Omega(t): t >= 0, sum t = b_j, |t|_0 <= k}, s = alpha - C.

    alpha, a (B, m), cost (B, m, n), b (B, n) -> Q (B,), a - T 1 (B, m), beta (B, n).
    l2, sparse: t = [s - theta]+ / gamma on the k largest, beta = -theta. negentropy: t = b softmax
    (s / gamma), beta = gamma (1 + log b - LSE). Forbidden pairs (cost +inf) get no mass; a column
    with b = 0 or without an admissible row none at all.
    """
    wide = cost.to(state_dtype(cost))
    s = alpha[:, :, None] - wide  # (B, m, n)
    if reg == "negentropy":
        lse = gamma * torch.logsumexp(s / gamma, dim=1)  # (B, n)
        log_b = b.log()
        open_columns = (b > 0) & lse.isfinite()  # (B, n)
        t = torch.where(open_columns[:, None], torch.exp((s - lse[:, None]) / gamma), 0)
        t = t * b[:, None]
        value = torch.where(open_columns, b * (lse - gamma * log_b), 0)  # (B, n)
        return (
            (a * alpha).sum(1) - value.sum(1), a - t.sum(2), gamma + gamma * log_b - lse,
        )  # fmt: skip
    top, rows = top_sorted(s, max_nz)  # (B, k, n)
    theta = threshold(top, gamma * b)  # (B, n)
    kept = torch.where(top > theta[:, None], (top - theta[:, None]) / gamma, 0)  # (B, k, n)
    mean = torch.where(kept > 0, (top + theta[:, None]) / 2, 0)  # s - gamma t / 2
    row_sums = torch.zeros_like(alpha).scatter_add(1, rows.flatten(1), kept.flatten(1))
    return (a * alpha).sum(1) - (kept * mean).sum((1, 2)), a - row_sums, -theta


def _ot_semidual_value_grad_fake(alpha, cost, a, b, *_):
    return alpha.new_empty(alpha.shape[:1]), torch.empty_like(alpha), torch.empty_like(b)


def _ot_semidual_value_grad_inputs(size, dtype, device, seed):
    cost, a, b, alpha, _, reg, k = random_problem(size, dtype, device, seed)
    return alpha, cost, a, b, reg, 0.5, k


def _ot_semidual_value_grad_floor(alpha, cost, a, b, *_):
    """One read of the cost; a subtraction, a comparison and the threshold's sum per entry."""
    return cost.nbytes + 3 * alpha.nbytes + 2 * b.nbytes, 3 * cost.numel()


OT_SEMIDUAL_VALUE_GRAD = declare(
    "ot_semidual_value_grad",
    forward="(Tensor alpha, Tensor cost, Tensor a, Tensor b, str reg, float gamma, int max_nz)"
    " -> (Tensor obj, Tensor grad_alpha, Tensor beta)",
    reference=_ot_semidual_value_grad_reference,
    fake=_ot_semidual_value_grad_fake,
    inputs=_ot_semidual_value_grad_inputs,
    floor=_ot_semidual_value_grad_floor,
    # one pair; lists in registers (k <= 8) and thresholds (k > 8); every regulariser; lanes' ends
    sizes={"test": [(1, 1, 1, 1), (2, 2, 6, 5), (3, 8, 40, 37), (2, 20, 70, 33),
                    (1, 1, 300, 50), (2, "l2", 40, 37), (2, "negentropy", 33, 37)],
           "bench": [(1, 2, 64, 64), (1, 8, 512, 512), (1, 48, 1024, 32), (1, 2, 2048, 2048),
                     (64, 32, 256, 16), (1, "l2", 512, 512), (1, "negentropy", 512, 512)]},
)  # fmt: skip


@public
def ot_semidual_value_grad(
    alpha: Tensor,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    reg: Literal["negentropy", "l2", "sparse"] = "sparse",
    gamma: float = 1.0,
    max_nz: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Value and gradient of the semi-dual of regularised optimal transport (to be maximised).

    :math:`Q(\alpha) = a\cdot\alpha - \sum_j \max\{t\cdot s_j - \Omega(t) : t \ge 0, \sum t = b_j
    (, \|t\|_0 \le k)\}` with :math:`s_{ij} = \alpha_i - C_{ij}`; its gradient is
    :math:`a - T\mathbf 1`. The columns of T have their sums exactly.

    Args:
        alpha: (..., m) potentials.
        cost: (..., m, n) float64, float32, bfloat16, float16; +inf forbids a pair. Read once.
        a: (..., m) row masses; None: uniform, sum 1.
        b: (..., n) column masses; None: uniform, sum 1.
        reg: "negentropy" :math:`\gamma\sum t\log t`; "l2" :math:`\frac\gamma2\|t\|^2`; "sparse":
            l2 with at most `max_nz` nonzeros per column.
        gamma: strength of the regulariser, > 0.
        max_nz: k for "sparse", at least 1; more than m means no bound.

    Returns:
        Q (...), its gradient (..., m) and beta (..., n), the eliminated potentials
        (:math:`D(\alpha,\beta) = Q(\alpha)`), in float32, or float64 where the cost is float64.
        A column without any admissible row and b > 0 is infeasible: it gets no mass, adds nothing
        to Q, and its beta is +inf.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equal scores: the lowest row is taken. No gradient flows (the returned one is Q's own).

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    problem = as_problem(cost, a, b, reg, gamma, max_nz, alpha=(alpha, -2))
    obj, grad, beta = OT_SEMIDUAL_VALUE_GRAD(
        problem.potentials[0], problem.cost, problem.a, problem.b, reg, problem.gamma, problem.k
    )
    columns = (*problem.batch, cost.shape[-1])
    return obj.view(problem.batch), grad.view(alpha.shape), beta.view(columns)
