"""Routes and plans: Philox4x32-10, ids drawn from it, and the counting sort of ids by expert.

The numbers are those of csrc/experts/philox.h, the plan that of csrc/experts/plan.h, bit for bit.
A plan is two launches (four with a capacity by choice) and a scan between them, by torch:

    _plan_kernel          a program compares its ids with each other: how often each occurs, (P, E)
    scan                  first slot of each program's ids of each expert, ends of the segments
    _plan_kernel, PLACE   the same comparison gives an id's rank among the program's: order, rank

No atomics: the first of a program's equal ids writes their number. Random ids are drawn again where
they are needed and never stored. Bytes: 4n read twice (or nothing), 8n written, 4 P E for counts;
64 comparisons an id, whatever E is (with 128 the registers spill).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_IDS = 64  # of a program
_MAX_EXPERTS = 512  # E / 16 bytes of counts for each id
_MAX_DRAWN = 16  # choices of a unit held in registers
_MAX_REDRAWN = 8  # choices that a plan draws again for each of them


# --------------------------------------------------------------------------------------------
# Philox


@triton.jit
def _philox(seed, offset, unit, block):
    """Four words (N,) of each unit: seed () uint64, offset (N,) uint64, unit (N,), block uint32."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = unit.to(tl.uint32)
    c1 = tl.zeros_like(c0) + block
    c2 = (offset & 0xFFFFFFFF).to(tl.uint32)
    c3 = (offset >> 32).to(tl.uint32)
    for _ in range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _choices(seed_ptr, offset_ptr, row, units, experts, K: tl.constexpr, KP: tl.constexpr,
             REPLACE: tl.constexpr):  # fmt: skip
    """(N, KP) int32: the K choices of each row (unit row % U of pass row // U).

    Without replacement a draw m becomes m + #{keys <= m}, where the keys are the chosen ids, each
    less the number of smaller ones: what walking the chosen ids in ascending order gives."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    units = tl.maximum(units, 1)
    offset = tl.load(offset_ptr).to(tl.uint64) + (row // units).to(tl.uint64)  # (N,)
    unit = row % units
    column = tl.arange(0, KP)[None, :]  # (1, KP)
    empty = (row[:, None] + column).to(tl.int32) * 0  # (N, KP)
    picks = empty
    keys = empty + 0x7FFFFFFF
    c0, c1, c2, c3 = _philox(seed, offset, unit, 0)
    for j in tl.static_range(K):
        if j % 4 == 0:
            if j > 0:
                c0, c1, c2, c3 = _philox(seed, offset, unit, j // 4)
            word = c0
        elif j % 4 == 1:
            word = c1
        elif j % 4 == 2:
            word = c2
        else:
            word = c3
        left = experts if REPLACE else experts - j
        draw = ((word.to(tl.uint64) * left) >> 32).to(tl.int32)  # (N,)
        if REPLACE:
            picks = tl.where(column == j, draw[:, None], picks)
        else:
            below = keys <= draw[:, None]  # (N, KP)
            pick = draw + tl.sum(below.to(tl.int32), 1)
            picks = tl.where(column == j, pick[:, None], picks)
            keys = tl.where((column < j) & (keys > draw[:, None]), keys - 1, keys)
            keys = tl.where(column == j, draw[:, None], keys)
    return picks


# --------------------------------------------------------------------------------------------
# Routes


@triton.jit
def _route_random_kernel(
    seed_ptr,  # () int64
    offset_ptr,  # () int64
    ids_ptr,  # (P * U, K) int32
    rows,
    units,
    experts,
    K: tl.constexpr,
    KP: tl.constexpr,
    REPLACE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    picks = _choices(seed_ptr, offset_ptr, row, units, experts, K, KP, REPLACE)
    column = tl.arange(0, KP)[None, :]
    there = (row < rows)[:, None] & (column < K)
    tl.store(ids_ptr + row[:, None] * K + column, picks, mask=there)


@triton.jit
def _balanced_keys_kernel(
    seed_ptr,  # () int64
    offset_ptr,  # () int64
    key_ptr,  # (U,) int64
    units,
    BLOCK: tl.constexpr,
):
    """Word 0 of Philox4x32-10 with block word 2^31."""
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    offset = tl.zeros((BLOCK,), tl.uint64) + tl.load(offset_ptr).to(tl.uint64)
    word, _, _, _ = _philox(tl.load(seed_ptr).to(tl.uint64), offset, unit, 0x80000000)
    tl.store(key_ptr + unit, word.to(tl.int64), mask=unit < units)


@triton.jit
def _balanced_place_kernel(
    order_ptr,  # (U,) units by rising key
    ids_ptr,  # (U,) int32
    units,
    experts,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = position < units
    unit = tl.load(order_ptr + position, mask=inside, other=0)
    tl.store(ids_ptr + unit, (position * experts // units).to(tl.int32), mask=inside)


def _too_many_choices(top_k: int, most: int = _MAX_DRAWN) -> str | None:
    return None if top_k <= most else f"draws at most {most} choices, got {top_k}"


def _drawn(top_k: int, replace: bool) -> dict:
    return {"K": top_k, "KP": triton.next_power_of_2(top_k), "REPLACE": replace}


def route_random_supports(
    seed, offset, num_units, num_experts, top_k, replace, num_passes
) -> str | None:
    return _too_many_choices(top_k)


def route_random_forward(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int, top_k: int, replace: bool,
    num_passes: int,
) -> Tensor:  # fmt: skip
    """(P * U, k) int32"""
    rows = num_passes * num_units
    ids = torch.empty((rows, top_k), dtype=torch.int32, device=seed.device)
    if rows:
        _route_random_kernel[(triton.cdiv(rows, 256),)](
            seed, offset, ids, rows, num_units, num_experts, **_drawn(top_k, replace), ROWS=256,
            num_warps=4,
        )  # fmt: skip
    return ids


def route_balanced_forward(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int
) -> Tensor:
    """(U,) int32"""
    ids = torch.empty((num_units,), dtype=torch.int32, device=seed.device)
    if num_units:
        key = torch.empty((num_units,), dtype=torch.int64, device=seed.device)
        grid = (triton.cdiv(num_units, 1024),)
        _balanced_keys_kernel[grid](seed, offset, key, num_units, BLOCK=1024, num_warps=4)
        order = key.argsort(stable=True)
        _balanced_place_kernel[grid](order, ids, num_units, num_experts, BLOCK=1024, num_warps=4)
    return ids


# --------------------------------------------------------------------------------------------
# Plans


@triton.jit
def _take(ids_ptr, kept_ptr, seed_ptr, offset_ptr, n, tokens, units, experts, K: tl.constexpr,
          KP: tl.constexpr, REPLACE: tl.constexpr, DRAWN: tl.constexpr, BY_CHOICE: tl.constexpr,
          HAS_KEPT: tl.constexpr, IDS: tl.constexpr):  # fmt: skip
    """A program's ids (IDS,), -1 where they do not count, and their flat indices.

    BY_CHOICE: all first choices come before all second ones. HAS_KEPT: some are out already."""
    q = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    inside = q < n
    flat = q
    if BY_CHOICE:
        flat = q % tokens * K + q // tokens
    if DRAWN:
        picks = _choices(seed_ptr, offset_ptr, flat // K, units, experts, K, KP, REPLACE)
        mine = tl.arange(0, KP)[None, :] == (flat % K)[:, None]
        ids = tl.sum(tl.where(mine, picks, 0), 1)
    else:
        ids = tl.load(ids_ptr + flat, mask=inside, other=-1)
    inside = inside & (ids >= 0) & (ids < experts)
    if HAS_KEPT:
        inside = inside & (tl.load(kept_ptr + flat, mask=inside, other=-1) >= 0)
    return tl.where(inside, ids, -1), flat, q < n


@triton.jit
def _equals(ids, IDS: tl.constexpr):
    """How many equal ids stand before each (IDS,), and how many there are: one sum for both."""
    at = tl.arange(0, IDS)
    earlier = (at[None, :] < at[:, None]).to(tl.int32)
    both = tl.sum(tl.where(ids[:, None] == ids[None, :], 65536 + earlier, 0), 1)
    return both & 65535, both >> 16


@triton.jit
def _plan_kernel(
    ids_ptr,  # (T, K) int32, read unless DRAWN
    kept_ptr,  # (T, K) int32, read if HAS_KEPT: -1 is out
    seed_ptr,  # () int64, read if DRAWN
    offset_ptr,  # () int64, read if DRAWN
    table_ptr,  # (P, E) int32: how many of e a program has (zeros before); PLACE: its first slot
    last_ptr,  # (E,) int32, read if PLACE: slots from here on are not the expert's
    order_ptr,  # (R,) int32, written if PLACE and not BY_CHOICE
    rank_ptr,  # (T, K) int32, written if PLACE
    n,
    tokens,
    units,
    experts,
    K: tl.constexpr,
    KP: tl.constexpr,
    REPLACE: tl.constexpr,
    DRAWN: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    PLACE: tl.constexpr,
    IDS: tl.constexpr,
):
    ids, flat, inside = _take(
        ids_ptr, kept_ptr, seed_ptr, offset_ptr, n, tokens, units, experts, K, KP, REPLACE, DRAWN,
        BY_CHOICE, HAS_KEPT, IDS
    )  # fmt: skip
    before, total = _equals(ids, IDS)
    counts = ids >= 0
    at = table_ptr + tl.program_id(0).to(tl.int64) * experts + ids
    if PLACE:
        place = tl.load(at, mask=counts, other=0) + before
        room = counts & (place < tl.load(last_ptr + ids, mask=counts, other=0))
        if not BY_CHOICE:
            tl.store(order_ptr + place, flat.to(tl.int32), mask=room)
        tl.store(rank_ptr + flat, tl.where(room, place, -1), mask=inside)
    else:
        tl.store(at, total, mask=counts & (before == 0))


class _Ids:
    """Where a plan's ids come from: a tensor, or the generator."""

    def __init__(self, tokens: int, top_k: int, num_experts: int, like: Tensor, *,
                 ids: Tensor | None = None, route: tuple | None = None):  # fmt: skip
        self.tokens, self.top_k, self.experts, self.like = tokens, top_k, num_experts, like
        self.n = tokens * top_k
        self.programs = triton.cdiv(self.n, _IDS)
        seed, offset, units, replace = route or (like, like, 0, False)
        self.pointers = like if ids is None else ids, seed, offset
        self.sizes = self.n, tokens, units, num_experts
        self.options = {"DRAWN": route is not None, "IDS": _IDS, **_drawn(top_k, replace)}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.like.device)

    def launch(self, table: Tensor, kept: Tensor | None, by_choice: bool,
               places: tuple | None = None) -> None:  # fmt: skip
        """places: last, order, rank; without them the ids are counted."""
        ids, seed, offset = self.pointers
        if self.n:
            _plan_kernel[(self.programs,)](
                ids, ids if kept is None else kept, seed, offset, table,
                *(places or (table, table, table)), *self.sizes, BY_CHOICE=by_choice,
                HAS_KEPT=kept is not None, PLACE=places is not None, num_warps=4, **self.options,
            )  # fmt: skip

    def counts(self, kept: Tensor | None, by_choice: bool) -> tuple[Tensor, Tensor]:
        """(P, E): how many of e stand in the programs before; (E,): in all."""
        counts = self.like.new_zeros((self.programs, self.experts), dtype=torch.int32)
        self.launch(counts, kept, by_choice)
        return counts.cumsum(0, dtype=torch.int32) - counts, counts.sum(0, dtype=torch.int32)


def _plan(ids: _Ids, capacity: int | None, priority: str, align: int, slots: int):
    kept = routed = None
    rank = ids.empty(ids.tokens, ids.top_k)
    if capacity is not None and priority == "choice":
        kept = torch.empty_like(rank)
        before, routed = ids.counts(None, True)
        room = torch.full_like(routed, capacity)
        ids.launch(before, None, True, (room, kept, kept))
    before, counts = ids.counts(kept, False)
    if routed is None:
        routed = counts
    if capacity is not None:
        counts = counts.clamp(max=capacity)
    spans = (counts + (align - 1)) // align * align  # (E,)
    offsets = spans.cumsum(0, dtype=torch.int32)
    starts = offsets - spans
    order = torch.full((slots,), -1, dtype=torch.int32, device=rank.device)
    ids.launch(before + starts, kept, False, (starts + counts, order, rank))
    return counts, routed, offsets, order, rank


def _slots(n: int, num_experts: int, align: int) -> int:
    return n if align == 1 else (n + num_experts * (align - 1) + align - 1) // align * align


def _too_many_experts(num_experts: int) -> str | None:
    if num_experts <= _MAX_EXPERTS:
        return None
    return f"counts for at most {_MAX_EXPERTS} experts, got {num_experts}"


def dispatch_plan_supports(
    expert_idx, scores, num_experts, capacity, priority, align
) -> str | None:
    return "has no order by score" if scores is not None else _too_many_experts(num_experts)


def dispatch_plan_forward(
    expert_idx: Tensor, scores: None, num_experts: int, capacity: int | None, priority: str,
    align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(T, k) -> counts, routed, offsets (E,), order (R,), rank (T, k)"""
    ids = _Ids(*expert_idx.shape, num_experts, expert_idx, ids=expert_idx)
    return _plan(ids, capacity, priority, align, _slots(ids.n, num_experts, align))


def random_plan_supports(
    seed, offset, num_units, num_experts, top_k, replace, num_passes, capacity, priority, align
) -> str | None:
    return _too_many_choices(top_k, _MAX_REDRAWN) or _too_many_experts(num_experts)


def random_plan_forward(
    seed: Tensor, offset: Tensor, num_units: int, num_experts: int, top_k: int, replace: bool,
    num_passes: int, capacity: int | None, priority: str, align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """counts, routed, offsets (E,), order (R,), rank (P * U, k)"""
    route = seed, offset, num_units, replace
    ids = _Ids(num_passes * num_units, top_k, num_experts, seed, route=route)
    return _plan(ids, capacity, priority, align, _slots(ids.n, num_experts, align))
