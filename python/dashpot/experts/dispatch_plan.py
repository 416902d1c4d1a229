"""The op `dispatch_plan`: (token, choice) pairs sorted by expert, with capacity and alignment."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_choice
from dashpot.experts._plan import (
    DispatchPlan,
    check_capacity,
    check_experts,
    check_ids,
    check_like,
    check_slots,
    plan_fake,
    plan_floor,
    random_ids,
    random_matrix,
    slots,
)

PRIORITIES = ("choice", "token", "score")


def _dispatch_plan_reference(
    expert_idx: Tensor, scores: Tensor | None, num_experts: int, capacity: int | None,
    priority: str, align: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Stable sort by expert of the flat indices i = t*k + j that are kept: an expert's first C by
    priority. Slot of i = start of its expert's segment + number of kept j < i of that expert."""
    tokens, k = expert_idx.shape
    n = tokens * k
    ids = expert_idx.reshape(-1).long()  # (n,)
    keep = (ids >= 0) & (ids < num_experts)
    key = torch.where(keep, ids, num_experts)  # (n,), E: not routed
    place, routed = _rank_within(key, num_experts)
    if capacity is not None:
        if priority != "token":
            visit = _visits(tokens, k, scores if priority == "score" else None, ids)  # (n,)
            there, _ = _rank_within(key[visit], num_experts)
            place = torch.zeros_like(ids).scatter(0, visit, there)
        keep = keep & (place < capacity)
        key = torch.where(keep, ids, num_experts)
    place, counts = _rank_within(key, num_experts)
    spans = (counts + align - 1) // align * align  # (E,)
    offsets = spans.cumsum(0)
    starts = torch.cat([offsets - spans, offsets[-1:]])  # (E + 1,)
    rank = torch.where(keep, place + starts[key], -1)  # (n,)
    length = slots(n, num_experts, align)
    order = torch.full((length + 1,), -1, dtype=torch.int64, device=ids.device)
    flat = torch.arange(n, device=ids.device)
    order = order.scatter(0, torch.where(keep, rank, length), torch.where(keep, flat, -1))
    return (
        counts.int(), routed.int(), offsets.int(), order[:length].int(),
        rank.int().reshape(tokens, k),
    )  # fmt: skip


def _rank_within(key: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """How many equal keys stand before each (n,), and the count of each key below E (E,)."""
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=key.device)
    counts = counts.scatter_add(0, key, torch.ones_like(key))
    order = key.argsort(stable=True)
    position = torch.zeros_like(key).scatter(
        0, order, torch.arange(key.shape[0], device=key.device)
    )
    return position - (counts.cumsum(0) - counts)[key], counts[:-1]


def _visits(tokens: int, k: int, scores: Tensor | None, like: Tensor) -> Tensor:
    """Flat indices by falling priority (n,): by score, else all first choices, then all second."""
    if scores is None:
        return torch.arange(tokens * k, device=like.device).reshape(tokens, k).T.reshape(-1)
    flat = scores.reshape(-1)
    flat = torch.where(flat.isnan(), -torch.inf, flat)
    return flat.argsort(descending=True, stable=True)


def _dispatch_plan_fake(expert_idx, scores, num_experts, capacity, priority, align):
    return plan_fake(expert_idx, *expert_idx.shape, num_experts, align)


def _dispatch_plan_inputs(size, dtype, device, seed):
    """size: (E, k, capacity or -1, priority, align, T)."""
    num_experts, k, capacity, priority, align, tokens = size
    ids = random_ids(tokens, k, num_experts, seed, device)
    scores = None
    if priority == "score":
        scores = random_matrix(tokens, k, dtype=torch.float32, device=device, seed=seed).round(
            decimals=1
        )
    return ids, scores, num_experts, None if capacity < 0 else capacity, priority, align


def _dispatch_plan_floor(expert_idx, scores, num_experts, *_):
    read = expert_idx.numel() * expert_idx.element_size() + (
        0 if scores is None else scores.numel() * scores.element_size()
    )
    return plan_floor(expert_idx.numel(), num_experts, read)


DISPATCH_PLAN = declare(
    "dispatch_plan",
    forward="(Tensor expert_idx, Tensor? scores, int num_experts, int? capacity, str priority,"
    " int align) -> (Tensor counts, Tensor routed, Tensor offsets, Tensor order, Tensor rank)",
    reference=_dispatch_plan_reference,
    fake=_dispatch_plan_fake,
    inputs=_dispatch_plan_inputs,
    floor=_dispatch_plan_floor,
    # one expert; k = E; each priority with ties; padding; capacity 0 and 1; a block of the kernels
    # and a tail; more experts than a warp's lanes; no token
    sizes={"test": [(1, 1, -1, "choice", 1, 7), (4, 4, -1, "choice", 1, 33),
                    (5, 2, 9, "choice", 1, 40), (5, 2, 9, "token", 8, 41),
                    (5, 3, 7, "score", 16, 37), (3, 2, 0, "choice", 1, 20),
                    (100, 2, -1, "choice", 8, 1500), (64, 2, 20, "choice", 1, 1700),
                    (64, 1, 30, "score", 1, 4100), (300, 8, -1, "choice", 1, 2500),
                    (4, 2, -1, "choice", 4, 0)],
           "bench": [(64, 1, -1, "choice", 1, 65_536), (64, 2, -1, "choice", 1, 65_536)]},
    prefer="cuda",
)  # fmt: skip


@public
def dispatch_plan(
    expert_idx: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    priority: Literal["choice", "token", "score"] = "choice",
    scores: Tensor | None = None,
    align: int = 1,
) -> DispatchPlan:
    r"""Group the T*k (token, choice) pairs by expert: a stable counting sort, two passes over ids.

    An expert's rows are in ascending order of the flat index :math:`i = tk + j`.

    Args:
        expert_idx: (T, k) or (T,) int32 (int64 is converted); an id outside [0, E) is "not routed".
        num_experts: E, 1 to 65536.
        capacity: C >= 0 rows that an expert may keep, the first by `priority`; None keeps all.
            Take care when it comes from a factor: libraries round it differently.
        priority: "choice": all first choices in token order, then all second ones (GShard, Switch,
            Tutel); "token": ascending i; "score": falling score, then ascending i.
        scores: (T, k) floats, for priority "score" alone; NaN comes last. No gradient flows.
        align: each segment is padded to a multiple of it, 1 to 2^20.

    Returns:
        `DispatchPlan` (counts, routed, offsets, order, rank), int32. R = T*k; with align > 1 the
        bound T*k + E*(align - 1), rounded up to align: the true end stays on the device, in
        ``offsets[-1]``, and nothing is read by the host.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    ids = check_ids(expert_idx)
    check_experts(num_experts)
    check_capacity(capacity, align)
    check_choice("priority", priority, PRIORITIES)
    check_slots(ids.numel(), num_experts, align)
    if (priority == "score") != (scores is not None):
        raise ValueError(
            f"scores: expected {'a tensor' if scores is None else 'None'} for "
            f'priority="{priority}", got {type(scores).__name__}'
        )
    if scores is not None:
        shape = tuple(expert_idx.shape)
        scores = check_like(
            "scores", scores, shape, ids,
            (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        ).detach()  # fmt: skip
        scores = scores.reshape(ids.shape)
        scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    if ids.dtype == torch.int64:
        ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1).int()
    if capacity is None or ids.shape[1] == 1:  # all orders of priority but "score" are the same
        priority = "token" if scores is None or capacity is None else priority
        scores = None if capacity is None else scores
    return DispatchPlan(*DISPATCH_PLAN(ids, scores, num_experts, capacity, priority, align))
