"""The op `route_random`: k of E experts for each unit, drawn by a counter-based generator."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.experts._philox import philox, state_of
from dashpot.experts._plan import check_bool, check_experts, check_int


def _route_random_reference(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int, top_k: int, replace: bool,
    num_passes: int,
) -> Tensor:  # fmt: skip
    """e_j = floor(r_j E / 2^32) with word j of unit u and pass p; without replacement the draw is
    among the E - j experts not chosen yet, in ascending order. (P*U, k) int32."""
    unit = torch.arange(num_units, device=seed.device)  # (U,)
    passes = []
    for p in range(num_passes):
        words = []
        for block in range((top_k + 3) // 4):
            words += philox(seed, offset + p, unit, block)
        chosen = []
        for j in range(top_k):
            free = num_experts if replace else num_experts - j
            pick = (words[j] * free) >> 32  # (U,)
            if not replace and j:
                for other in torch.stack(chosen).sort(0).values.unbind(0):  # ascending
                    pick = pick + (pick >= other)
            chosen.append(pick)
        passes.append(torch.stack(chosen, 1))  # (U, k)
    return torch.cat(passes).int()


def _route_random_fake(seed, offset, num_units, num_experts, top_k, replace, num_passes):
    return seed.new_empty((num_passes * num_units, top_k), dtype=torch.int32)


def _route_random_inputs(size, dtype, device, seed):
    """size: (E, k, replace, P, U)."""
    num_experts, top_k, replace, num_passes, units = size
    state = [torch.tensor(value, device=device) for value in (1234 + seed, 7 - seed)]
    return *state, units, num_experts, top_k, bool(replace), num_passes


def _route_random_floor(seed, offset, num_units, num_experts, top_k, replace, num_passes):
    """The ids out; ten rounds of two products for each four words."""
    count = num_passes * num_units
    return 4 * count * top_k + 16, count * ((top_k + 3) // 4) * 100


ROUTE_RANDOM = declare(
    "route_random",
    forward="(Tensor seed, Tensor offset, SymInt num_units, int num_experts, int top_k,"
    " bool replace, int num_passes) -> (Tensor expert_idx)",
    reference=_route_random_reference,
    fake=_route_random_fake,
    inputs=_route_random_inputs,
    floor=_route_random_floor,
    # one expert; all of them; several blocks of words; with replacement beyond E; a vector and a
    # tail; a block of threads and a tail; no unit
    sizes={"test": [(1, 1, 0, 1, 5), (4, 4, 0, 2, 33), (64, 9, 0, 1, 17), (3, 5, 1, 2, 40),
                    (7, 2, 0, 3, 1500), (8, 1, 0, 1, 0)],
           "bench": [(8, 1, 0, 1, 65_536), (64, 2, 0, 2, 65_536)]},
    prefer="cuda",
)  # fmt: skip


def check_route(num_units, num_experts, top_k, replace, num_passes) -> None:
    check_int("num_units", num_units, 0)
    check_experts(num_experts)
    check_bool("replace", replace)
    check_int("top_k", top_k, 1, 1024)
    check_int("num_passes", num_passes, 1)
    if not replace and top_k > num_experts:
        raise ValueError(
            f"top_k: expected at most num_experts = {num_experts} without replacement, got {top_k}"
        )
    if num_passes * num_units * top_k > 2**31 - 1:
        raise ValueError(
            f"num_units: expected at most 2^31 - 1 choices, "
            f"got {num_passes} x {num_units} x {top_k}"
        )


@public
def route_random(
    num_units: int,
    num_experts: int,
    *,
    top_k: int = 1,
    replace: bool = False,
    num_passes: int = 1,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw k of E experts for each unit (a token, a sequence, a batch).

    Philox4x32-10 with key `seed` and counter (unit, block, offset): the same numbers on every
    backend and in any order, and no state. Choice j takes word r of block j // 4 and is
    :math:`\lfloor r\,n / 2^{32} \rfloor` among n experts: all E with replacement, those not yet
    chosen without.

    Args:
        num_units: U >= 0 units, numbered from 0.
        num_experts: E >= 1.
        top_k: k choices of a unit, 1 <= k <= 1024; at most E without replacement.
        replace: whether a unit may draw an expert twice.
        num_passes: P independent draws; pass p uses ``offset + p``. Two passes in one call make one
            doubled batch.
        seed: any 64 bits (int, or a 0-d int64 tensor on the device).
        offset: advances the draw (int, or a 0-d int64 tensor on the device, which a captured CUDA
            graph may advance in place).
        device: of the result; default: that of `seed` or `offset` where one is a tensor, else the
            CPU.

    Returns:
        ids (P*U, k) int32; pass p has rows p*U to p*U + U - 1. Recomputing a layer (checkpointing)
        must pass the same seed and offset.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Taming Sparsely Activated Transformer with Stochastic Experts, arXiv 2110.04260. The
    published code draws one expert for a whole batch with the host's generator.
    """
    check_route(num_units, num_experts, top_k, replace, num_passes)
    seed, offset = state_of(seed, offset, device)
    return ROUTE_RANDOM(seed, offset, num_units, num_experts, top_k, replace, num_passes)
