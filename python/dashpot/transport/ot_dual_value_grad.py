"""The op `ot_dual_value_grad`: one evaluation of the dual, in one read of the cost."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.transport._problem import as_problem, random_problem, state_dtype, top_sorted


def _ot_dual_value_grad_reference(
    alpha: Tensor, beta: Tensor, cost: Tensor, a: Tensor, b: Tensor, reg: str, gamma: float,
    max_nz: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """D = a.alpha + b.beta - sum_j Omega+(s_j), s = alpha + beta - C.

    alpha, a (B, m), beta, b (B, n), cost (B, m, n) -> D (B,), a - T 1 (B, m), b - T^T 1 (B, n).
    l2, sparse: Omega+ = sum [s]+^2 / (2 gamma) over the k largest, T = [s]+ / gamma there;
    negentropy: Omega+ = gamma sum T, T = exp(s / gamma - 1).
    """
    wide = cost.to(state_dtype(cost))
    s = alpha[:, :, None] + beta[:, None, :] - wide  # (B, m, n)
    linear = (a * alpha).sum(1) + (b * beta).sum(1)  # (B,)
    if reg == "negentropy":
        t = torch.exp(s / gamma - 1)
        return linear - gamma * t.sum((1, 2)), a - t.sum(2), b - t.sum(1)
    top, rows = top_sorted(s, max_nz)  # (B, k, n)
    t = top.clamp(min=0) / gamma
    row_sums = torch.zeros_like(alpha).scatter_add(1, rows.flatten(1), t.flatten(1))
    return linear - gamma / 2 * t.square().sum((1, 2)), a - row_sums, b - t.sum(1)


def _ot_dual_value_grad_fake(alpha, beta, *_):
    return alpha.new_empty(alpha.shape[:1]), torch.empty_like(alpha), torch.empty_like(beta)


def _ot_dual_value_grad_inputs(size, dtype, device, seed):
    cost, a, b, alpha, beta, reg, k = random_problem(size, dtype, device, seed)
    return alpha, beta, cost, a, b, reg, 0.5, k


def _ot_dual_value_grad_floor(alpha, beta, cost, *_):
    """One read of the cost; two additions, a comparison and a sum per entry."""
    return cost.nbytes + 3 * (alpha.nbytes + beta.nbytes), 4 * cost.numel()


OT_DUAL_VALUE_GRAD = declare(
    "ot_dual_value_grad",
    forward="(Tensor alpha, Tensor beta, Tensor cost, Tensor a, Tensor b, str reg, float gamma,"
    " int max_nz) -> (Tensor obj, Tensor grad_alpha, Tensor grad_beta)",
    reference=_ot_dual_value_grad_reference,
    fake=_ot_dual_value_grad_fake,
    inputs=_ot_dual_value_grad_inputs,
    floor=_ot_dual_value_grad_floor,
    sizes={"test": [(1, 1, 1, 1), (2, 2, 6, 5), (3, 8, 40, 37), (2, 20, 70, 33),
                    (1, 1, 300, 50), (2, "l2", 40, 37), (1, "l2", 5, 1100),
                    (2, "negentropy", 33, 37)],
           "bench": [(1, 2, 64, 64), (1, 8, 512, 512), (1, 48, 1024, 32), (1, 2, 2048, 2048),
                     (64, 32, 256, 16), (1, "l2", 512, 512), (1, "negentropy", 512, 512)]},
)  # fmt: skip


@public
def ot_dual_value_grad(
    alpha: Tensor,
    beta: Tensor,
    cost: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    *,
    reg: Literal["negentropy", "l2", "sparse"] = "sparse",
    gamma: float = 1.0,
    max_nz: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Value and gradients of the dual of regularised optimal transport (to be maximised).

    :math:`D(\alpha, \beta) = a\cdot\alpha + b\cdot\beta - \sum_j \Omega^+(s_j)`,
    :math:`s_{ij} = \alpha_i + \beta_j - C_{ij}`; its gradients are :math:`a - T\mathbf 1` and
    :math:`b - T^T\mathbf 1` with :math:`T_j = \nabla\Omega^+(s_j)`: :math:`[s]_+/\gamma` (on the k
    largest entries of a column for "sparse"), or :math:`e^{s/\gamma - 1}` for "negentropy".

    Args:
        alpha: (..., m) potentials of the rows.
        beta: (..., n) potentials of the columns.
        cost: (..., m, n) float64, float32, bfloat16, float16; +inf forbids a pair. Read once.
        a: (..., m) row masses; None: uniform, sum 1.
        b: (..., n) column masses; None: uniform, sum 1.
        reg, gamma, max_nz: as in `ot_semidual_value_grad`.

    Returns:
        D (...) and its gradients (..., m), (..., n), in float32, or float64 where the cost is.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Not smooth where the k-th and the next entry of a column are equal and positive; the lowest
    row is taken there. No gradient flows (the returned ones are D's own).

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466.
    """
    problem = as_problem(cost, a, b, reg, gamma, max_nz, alpha=(alpha, -2), beta=(beta, -1))
    obj, grad_alpha, grad_beta = OT_DUAL_VALUE_GRAD(
        *problem.potentials, problem.cost, problem.a, problem.b, reg, problem.gamma, problem.k
    )
    return obj.view(problem.batch), grad_alpha.view(alpha.shape), grad_beta.view(beta.shape)
