"""The op `random_plan`: the plan of random routes that are never stored."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_choice
from dashpot.experts._philox import state_of
from dashpot.experts._plan import (
    DispatchPlan,
    check_capacity,
    check_slots,
    plan_fake,
    plan_floor,
)
from dashpot.experts.dispatch_plan import _dispatch_plan_reference
from dashpot.experts.route_random import _route_random_reference, check_route


def _random_plan_reference(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int, top_k: int, replace: bool,
    num_passes: int, capacity: int | None, priority: str, align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dispatch_plan(route_random(...))."""
    ids = _route_random_reference(seed, offset, num_units, num_experts, top_k, replace, num_passes)
    return _dispatch_plan_reference(ids, None, num_experts, capacity, priority, align)


def _random_plan_fake(
    seed, offset, num_units, num_experts, top_k, replace, num_passes, capacity, priority, align
):
    return plan_fake(seed, num_passes * num_units, top_k, num_experts, align)


def _random_plan_inputs(size, dtype, device, seed):
    """size: (E, k, replace, P, capacity or -1, priority, align, U)."""
    num_experts, top_k, replace, num_passes, capacity, priority, align, units = size
    state = [torch.tensor(value, device=device) for value in (1234 + seed, 7 - seed)]
    return (
        *state, units, num_experts, top_k, bool(replace), num_passes,
        None if capacity < 0 else capacity, priority, align,
    )  # fmt: skip


def _random_plan_floor(seed, offset, num_units, num_experts, top_k, replace, num_passes, *_):
    bytes_, flops = plan_floor(num_passes * num_units * top_k, num_experts, 16)
    return bytes_, flops + num_passes * num_units * ((top_k + 3) // 4) * 100


RANDOM_PLAN = declare(
    "random_plan",
    forward="(Tensor seed, Tensor offset, SymInt num_units, int num_experts, int top_k,"
    " bool replace, int num_passes, int? capacity, str priority, int align)"
    " -> (Tensor counts, Tensor routed, Tensor offsets, Tensor order, Tensor rank)",
    reference=_random_plan_reference,
    fake=_random_plan_fake,
    inputs=_random_plan_inputs,
    floor=_random_plan_floor,
    # one expert; several blocks of words; both priorities; padding; a block of the kernels and a
    # tail, two passes; no unit
    sizes={"test": [(4, 1, 0, 2, -1, "token", 8, 0), (1, 1, 0, 1, -1, "token", 1, 5),
                    (9, 6, 0, 1, 5, "choice", 4, 17),
                    (5, 2, 1, 2, 11, "token", 1, 40), (64, 2, 0, 2, 30, "choice", 8, 1500),
                    (40, 1, 0, 1, -1, "token", 1, 5000)],
           "bench": [(8, 1, 0, 2, -1, "token", 1, 65_536), (64, 2, 0, 1, -1, "token", 1, 65_536)]},
    prefer="cuda",
)  # fmt: skip


@public
def random_plan(
    num_units: int,
    num_experts: int,
    *,
    top_k: int = 1,
    replace: bool = False,
    num_passes: int = 1,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
    capacity: int | None = None,
    priority: Literal["choice", "token"] = "choice",
    align: int = 1,
) -> DispatchPlan:
    r"""``dispatch_plan(route_random(...))`` with the same bits, the ids never in memory.

    The plan needs each id twice; drawing it again costs less than writing and reading it.

    Args:
        num_units: U units, here tokens: T = num_passes * U.
        num_experts, top_k, replace, num_passes: as in `route_random`.
        seed: as in `route_random` (int, or a 0-d int64 tensor on the device).
        offset: as in `route_random` (int, or a 0-d int64 tensor on the device).
        device: as in `route_random`.
        capacity, priority, align: as in `dispatch_plan`; there are no scores.

    Returns:
        `DispatchPlan` (counts, routed, offsets, order, rank), int32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_route(num_units, num_experts, top_k, replace, num_passes)
    check_capacity(capacity, align)
    check_choice("priority", priority, ("choice", "token"))
    check_slots(num_passes * num_units * top_k, num_experts, align)
    seed, offset = state_of(seed, offset, device)
    priority = "token" if capacity is None or top_k == 1 else priority
    return DispatchPlan(
        *RANDOM_PLAN(
            seed, offset, num_units, num_experts, top_k, replace, num_passes, capacity, priority,
            align,
        )
    )  # fmt: skip
