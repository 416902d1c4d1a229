"""The op `unpermute`: rows back to their tokens, the k choices combined."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of
from dashpot.experts._plan import (
    DispatchPlan,
    check_device,
    check_plan,
    check_rows,
    check_weights,
    gather,
    random_matrix,
    work_dtype,
)
from dashpot.experts.permute import PLAN_SIZES, plan_inputs, sum_choices


def _unpermute_reference(h: Tensor, order: Tensor, rank: Tensor, weights: Tensor | None) -> Tensor:
    """y_t = sum_j w_tj h[rank_tj] (w = 1 if None), dropped choices 0: (T, d)."""
    return sum_choices(h, rank, weights)


def _unpermute_backward(
    grad_y: Tensor, h: Tensor, order: Tensor, rank: Tensor, weights: Tensor | None,
    needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dh[r] = w_tj dy_t for slot r of choice tj, 0 in padding; dw_tj = <h[rank_tj], dy_t>."""
    k = rank.shape[1]
    grad_h = grad_weights = None
    if needs_grad[0]:
        grad_h = gather(grad_y, order.div(k, rounding_mode="floor"))  # (R, d)
        if weights is not None:
            grad_h = (scale_of(weights, order).to(work_dtype(h.dtype)) * grad_h).to(h.dtype)
    if needs_grad[3] and weights is not None:
        dots = gather_dots(h, grad_y, rank)  # (T, k)
        grad_weights = dots.to(weights.dtype)
    return grad_h, grad_weights


def scale_of(weights: Tensor, order: Tensor) -> Tensor:
    """The weight of each slot (R, 1), 0 in padding."""
    return gather(weights.reshape(-1, 1), order)


def gather_dots(h: Tensor, grad_y: Tensor, rank: Tensor) -> Tensor:
    """<h[rank_tj], dy_t> (T, k), 0 where dropped."""
    work = work_dtype(h.dtype)
    rows = grad_y.to(work)
    return torch.stack(
        [(gather(h, rank[:, j]).to(work) * rows).sum(1) for j in range(rank.shape[1])], dim=1
    )


def _unpermute_fake(h, order, rank, weights):
    return h.new_empty((rank.shape[0], h.shape[1]))


def _unpermute_inputs(size, dtype, device, seed):
    tokens, k, *_, d = size
    plan = plan_inputs(size, device, seed)
    h = random_matrix(plan.order.shape[0], d, dtype=dtype, device=device, seed=seed)
    if k == 1:
        return h, plan.order, plan.rank, None
    weights = random_matrix(tokens, k, dtype=dtype, device=device, seed=seed + 1).sigmoid()
    return h, plan.order, plan.rank, weights


def _unpermute_floor(h, order, rank, weights):
    """One read of the slots, one write of the rows, a multiply-add for each number read."""
    rows = rank.shape[0] * h.shape[1] * h.element_size()
    return bytes_of([h, rank]) + rows, 2 * h.numel()


UNPERMUTE = declare(
    "unpermute",
    forward="(Tensor h, Tensor order, Tensor rank, Tensor? weights) -> (Tensor y)",
    backward="(Tensor grad_y, Tensor h, Tensor order, Tensor rank, Tensor? weights,"
    " bool[] needs_grad) -> (Tensor grad_h, Tensor grad_weights)",
    reference=_unpermute_reference,
    reference_backward=_unpermute_backward,
    fake=_unpermute_fake,
    inputs=_unpermute_inputs,
    floor=_unpermute_floor,
    sizes=PLAN_SIZES,
)


@public
def unpermute(h: Tensor, plan: DispatchPlan, weights: Tensor | None = None) -> Tensor:
    r"""Bring rows back to their tokens: :math:`y_t = \sum_j w_{tj} h[\mathrm{rank}_{tj}]`.

    Args:
        h: (R, d) float64, float32, bfloat16 or float16, in the order of the plan.
        plan: of `dispatch_plan` or `random_plan`, on the device of h.
        weights: (T, k) in the dtype of h or float32; None is a plain sum (w = 1).

    Returns:
        y (T, d) in the dtype of h, summed in float32 at least, in the order of j. A dropped choice
        adds 0; it is not replaced by the token itself.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice, in h (:math:`w_{tj} dy_t`, padding 0) and weights
    (:math:`\langle h[\mathrm{rank}_{tj}], dy_t\rangle`).
    """
    plan = check_plan(plan)
    h = check_rows("h", h, plan.order.shape[0], "(R, d)")
    check_device("plan", plan.order, h)
    return UNPERMUTE(h, plan.order, plan.rank, check_weights(weights, plan.rank, h))
