"""The op `route_balanced`: a random routing whose experts get equally many units."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.experts._philox import BALANCED_BLOCK, philox, state_of
from dashpot.experts._plan import check_experts, check_int


def _route_balanced_reference(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int
) -> Tensor:
    """pos_u = rank of (word 0 of unit u, u); expert = floor(pos_u E / U). (U,) int32."""
    unit = torch.arange(num_units, device=seed.device)  # (U,)
    key = philox(seed, offset, unit, BALANCED_BLOCK)[0]
    order = key.argsort(stable=True)  # (U,)
    expert = unit * num_experts // max(1, num_units)  # of the unit at each position
    return torch.zeros_like(unit).scatter(0, order, expert).int()


def _route_balanced_fake(seed, offset, num_units, num_experts):
    return seed.new_empty((num_units,), dtype=torch.int32)


def _route_balanced_inputs(size, dtype, device, seed):
    """size: (E, U)."""
    num_experts, units = size
    state = [torch.tensor(value, device=device) for value in (1234 + seed, seed)]
    return *state, units, num_experts


def _route_balanced_floor(seed, offset, num_units, num_experts):
    """The ids out; a Philox draw and log2 U comparisons for each."""
    return 4 * num_units + 16, num_units * (100 + max(1, num_units).bit_length())


ROUTE_BALANCED = declare(
    "route_balanced",
    forward="(Tensor seed, Tensor offset, SymInt num_units, int num_experts)"
    " -> (Tensor expert_idx)",
    reference=_route_balanced_reference,
    fake=_route_balanced_fake,
    inputs=_route_balanced_inputs,
    floor=_route_balanced_floor,
    # one expert; fewer units than experts; a remainder; several blocks of a radix sort; no unit
    sizes={"test": [(1, 5), (8, 3), (4, 10), (7, 1500), (3, 70_000), (4, 0)],
           "bench": [(8, 65_536)]},
    prefer="cuda",  # 20 bytes a unit in five launches; Triton's way sorts int64 keys with torch
)  # fmt: skip


@public
def route_balanced(
    num_units: int,
    num_experts: int,
    *,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Route each unit to one expert at random, with counts that differ by at most one.

    The units are put in a random order, by a Philox key of their own, and the order is cut into E
    equal parts: :math:`e_u = \lfloor \mathrm{pos}_u E / U \rfloor`.

    Args:
        num_units: U >= 0.
        num_experts: E >= 1.
        seed: as in `route_random` (int, or a 0-d int64 tensor on the device).
        offset: as in `route_random` (int, or a 0-d int64 tensor on the device).
        device: as in `route_random`.

    Returns:
        ids (U,) int32, independent of `route_random` for the same seed and offset.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_int("num_units", num_units, 0)
    check_experts(num_experts)
    seed, offset = state_of(seed, offset, device)
    return ROUTE_BALANCED(seed, offset, num_units, num_experts)
