"""The op `permute`: rows gathered by expert."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of
from dashpot.experts._plan import (
    DispatchPlan,
    check_device,
    check_plan,
    check_rows,
    gather,
    random_ids,
    random_matrix,
    work_dtype,
)
from dashpot.experts.dispatch_plan import _dispatch_plan_reference


def _permute_reference(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """xp[r] = x[order[r] // k], zeros where order is -1: (R, d)."""
    k = rank.shape[1]
    return gather(x, order.div(k, rounding_mode="floor"))  # -1 stays negative


def _permute_backward(grad_xp: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """dx_t = sum_j dxp[rank_tj], a gather as well: (T, d)."""
    return sum_choices(grad_xp, rank, None)


def sum_choices(rows: Tensor, rank: Tensor, weights: Tensor | None) -> Tensor:
    """y_t = sum_j w_tj rows[rank_tj], (T, d); a dropped choice (rank -1) adds 0."""
    total = 0
    for j in range(rank.shape[1]):
        term = gather(rows, rank[:, j]).to(work_dtype(rows.dtype))  # (T, d)
        if weights is not None:  # a dropped choice's weight must not bring in its NaN
            term = term * weights[:, j, None].to(term.dtype).where(rank[:, j, None] >= 0, 0)
        total = total + term
    return total.to(rows.dtype)


def _permute_fake(x, order, rank):
    return x.new_empty((order.shape[0], x.shape[1]))


def plan_inputs(size, device, seed):
    """size: (T, k, E, align, d). A plan with dropped choices where k > 1."""
    tokens, k, num_experts, align, _ = size
    ids = random_ids(tokens, k, num_experts, seed, device)
    capacity = None if k == 1 else max(1, tokens * k // num_experts)
    plan = _dispatch_plan_reference(ids, None, num_experts, capacity, "choice", align)
    return DispatchPlan(*plan)


def _permute_inputs(size, dtype, device, seed):
    tokens, *_, d = size
    plan = plan_inputs(size, device, seed)
    return random_matrix(tokens, d, dtype=dtype, device=device, seed=seed), plan.order, plan.rank


def _permute_floor(x, order, rank):
    """One read of the rows, one write of the slots."""
    slots = order.shape[0]
    return bytes_of([x, order]) + slots * x.shape[1] * x.element_size(), slots


PLAN_SIZES = {
    # one token; one expert; k = E; padding; a SIMD width and a tail; blocks of rows and a tail;
    # rows of no coordinate, no token
    "test": [(1, 1, 1, 1, 5), (7, 2, 2, 1, 3), (33, 3, 5, 8, 17), (40, 1, 4, 4, 64),
             (300, 2, 9, 1, 130), (2, 2, 3, 1, 0), (0, 2, 3, 4, 8)],
    "bench": [(4096, 1, 8, 1, 1024), (4096, 2, 8, 1, 1024)],
}  # fmt: skip

PERMUTE = declare(
    "permute",
    forward="(Tensor x, Tensor order, Tensor rank) -> (Tensor xp)",
    backward="(Tensor grad_xp, Tensor order, Tensor rank) -> (Tensor grad_x)",
    reference=_permute_reference,
    reference_backward=_permute_backward,
    fake=_permute_fake,
    inputs=_permute_inputs,
    floor=_permute_floor,
    sizes=PLAN_SIZES,
)


@public
def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    r"""Gather the tokens' rows by expert: :math:`xp[\mathrm{rank}_{tj}] = x_t`.

    Args:
        x: (T, d) float64, float32, bfloat16 or float16.
        plan: of `dispatch_plan` or `random_plan`, on the device of x.

    Returns:
        xp (R, d) in the dtype of x; padding rows and rows past ``plan.offsets[-1]`` are zeros.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice: :math:`dx_t = \sum_j dxp[\mathrm{rank}_{tj}]`, a gather too, without
    atomics, summed in float32 at least.
    """
    plan = check_plan(plan)
    x = check_rows("x", x, plan.rank.shape[0], "(T, d)")
    check_device("plan", plan.order, x)
    return PERMUTE(x, plan.order, plan.rank)
