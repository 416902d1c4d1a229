"""What the family's ops share: the plan, its checks, inputs for tests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dashpot.aggregate._rows import check_tensor

LARGEST = 2**31 - 1  # slots are int32


class DispatchPlan(NamedTuple):
    """Which row goes where, on the device of the ids; all int32.

    counts: (E,) rows that each expert keeps. routed: (E,) rows sent to it, before dropping.
    offsets: (E,) ends of the experts' segments, padding included. order: (R,) slot -> flat index
    t*k + j, -1 for padding and past offsets[-1]. rank: (T, k) slot of each choice, -1 if dropped
    or not routed.
    """

    counts: Tensor
    routed: Tensor
    offsets: Tensor
    order: Tensor
    rank: Tensor


def slots(n: int, num_experts: int, align: int) -> int:
    """R: T*k, or the bound that holds whatever the ids are, a multiple of align."""
    return n if align == 1 else (n + num_experts * (align - 1) + align - 1) // align * align


def plan_fake(like: Tensor, tokens: int, k: int, num_experts: int, align: int) -> tuple:
    def empty(*shape):
        return like.new_empty(shape, dtype=torch.int32)

    n = slots(tokens * k, num_experts, align)
    return (*(empty(num_experts) for _ in range(3)), empty(n), empty(tokens, k))


def plan_floor(n: int, num_experts: int, read: int) -> tuple[int, int]:
    """The ids in, order and rank out; a comparison for each bit of an id."""
    return read + 8 * n + 12 * num_experts, n * max(1, num_experts - 1).bit_length()


# --------------------------------------------------------------------------------------------
# Checks


def check_int(name: str, value, low: int, high: int = LARGEST) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} <= {name} <= {high}, got {value}")


def check_bool(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_capacity(capacity, align) -> None:
    if capacity is not None:
        check_int("capacity", capacity, 0)
    check_int("align", align, 1, 1 << 20)


def check_slots(n: int, num_experts: int, align: int) -> None:
    if slots(n, num_experts, align) > LARGEST:
        raise ValueError(f"expert_idx: expected at most {LARGEST} slots, got {n} choices")


def check_experts(value, name: str = "num_experts") -> None:
    check_int(name, value, 1, 1 << 16)


def check_ids(expert_idx) -> Tensor:
    """expert_idx as (T, k) int32 or int64, contiguous."""
    if not isinstance(expert_idx, Tensor):
        raise TypeError(f"expert_idx: expected a torch.Tensor, got {type(expert_idx).__name__}")
    if expert_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_idx: expected int32 or int64, got {expert_idx.dtype}")
    if expert_idx.dim() not in (1, 2):
        raise ValueError(f"expert_idx: expected (T, k) or (T,), got {tuple(expert_idx.shape)}")
    if expert_idx.dim() == 1:
        expert_idx = expert_idx[:, None]
    if expert_idx.shape[1] == 0:
        raise ValueError(f"expert_idx: expected k >= 1 choices, got {tuple(expert_idx.shape)}")
    return expert_idx.contiguous()


def check_plan(plan) -> DispatchPlan:
    if not isinstance(plan, DispatchPlan):
        raise TypeError(f"plan: expected a DispatchPlan, got {type(plan).__name__}")
    return plan


def check_rows(name: str, value, rows: int | None, form: str) -> Tensor:
    """A float matrix, contiguous; rows: how many it must have."""
    check_tensor(value, name)
    if value.dim() != 2:
        raise ValueError(f"{name}: expected {form}, got {tuple(value.shape)}")
    if rows is not None and value.shape[0] != rows:
        raise ValueError(f"{name}: expected {form} with {rows} rows, got {tuple(value.shape)}")
    return value.contiguous()


def check_like(name: str, value, shape: tuple, like: Tensor, dtypes: tuple = ()) -> Tensor:
    """A float tensor of this shape, on the device of `like` and of its dtype (or one of dtypes)."""
    check_tensor(value, name)
    dtypes = dtypes or (like.dtype,)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        wanted = " or ".join(map(str, dict.fromkeys(dtypes)))
        raise TypeError(f"{name}: expected {wanted}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")
    return value.contiguous()


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")


def check_weights(weights, rank: Tensor, rows: Tensor) -> Tensor | None:
    """weights (T, k) in the rows' dtype or float32, or None."""
    if weights is None:
        return None
    return check_like("weights", weights, tuple(rank.shape), rows, (rows.dtype, torch.float32))


# --------------------------------------------------------------------------------------------
# Inputs and pieces of references


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are formed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] (n, d), zeros where index is -1."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # (T + 1, d), the last row zeros
    return padded[torch.where(index < 0, rows.shape[0], index).long()]


def random_ids(tokens: int, k: int, num_experts: int, seed: int, device) -> Tensor:
    """(T, k) int32, distinct within a token where k <= E; a few of them -1."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(tokens, max(k, num_experts), generator=generator)
    ids = draw.argsort(1)[:, :k] % num_experts
    return torch.where(draw[:, :k] > 0.95, -1, ids).int().to(device)


def random_matrix(*shape: int, dtype, device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)
