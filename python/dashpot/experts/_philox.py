"""Philox4x32-10, the counter-based generator of all routes, in integers of PyTorch.

Key (lo32 seed, hi32 seed), counter (unit, block, lo32 offset, hi32 offset); the four output words
of a counter do not depend on any other counter, so that every backend draws the same routes, in
any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
BALANCED_BLOCK = 0x80000000  # no choice of route_random ever reaches this block


def philox(seed: Tensor, offset: Tensor, unit: Tensor, block: int) -> list[Tensor]:
    """Four words (U,) in [0, 2^32), int64, of counters (unit, block, offset) under a seed.

    seed, offset: 0-d int64; unit: (U,) int64. Products wrap modulo 2^64, whose bits are those of
    the unsigned product.
    """
    c = [unit, torch.full_like(unit, block), offset & _WORD, (offset >> 32) & _WORD]
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            ((p1 >> 32) & _WORD) ^ c[1] ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c[3] ^ k1,
            p0 & _WORD,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [word.expand(unit.shape) for word in c]


def as_state(value: int | Tensor, name: str, device: torch.device | str) -> Tensor:
    """A seed or an offset as a 0-d int64 tensor on the device, without waiting for it."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            raise ValueError(
                f"{name}: expected an int or a 0-d int64 tensor, "
                f"got {tuple(value.shape)} {value.dtype}"
            )
        if value.device.type != torch.device(device).type:
            raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(
            f"{name}: expected an int or a 0-d int64 tensor, got {type(value).__name__}"
        )
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name}: expected at most 64 bits, got {value}")
    value = value - (1 << 64) if value >= 1 << 63 else value
    return torch.full((), value, dtype=torch.int64, device=device)  # a fill, not a copy


def state_of(seed, offset, device) -> tuple[Tensor, Tensor]:
    """Both, on `device`, or on the device of whichever is a tensor, or on the CPU."""
    if device is None:
        device = next((s.device for s in (seed, offset) if isinstance(s, Tensor)), "cpu")
    return as_state(seed, "seed", device), as_state(offset, "offset", device)
