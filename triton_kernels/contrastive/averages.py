"""Triton kernel of `ema_update_`: a launch per tensor.

New values are read once, averages read and written once, 16-bit values are widened in registers. A
table of addresses would save launches; it would have to be copied to the device on every call, and
a captured graph would replay the copy from memory that is no longer its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n"])
def _ema_update_kernel(
    x_ptr,  # (n,)
    y_ptr,  # (n,)
    weight_ptr,  # () float64
    out_ptr,  # (n,)
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = at < n
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(x.dtype)
    weight = tl.load(weight_ptr)
    near_x = weight < 0.5
    factor = tl.where(near_x, weight, weight - 1).to(x.dtype)
    tl.store(out_ptr + at, tl.where(near_x, x, y) + factor * (y - x), mask=inside)


def ema_update__forward(
    targets: list[Tensor], onlines: list[Tensor], weight: Tensor, out: list[Tensor] | None = None
) -> list[Tensor]:
    """[(...)], [(...)], () float64 -> [(...)]"""
    out = [torch.empty_like(x) for x in targets] if out is None else out
    for x, y, to in zip(targets, onlines, out, strict=True):
        if x.numel():
            _ema_update_kernel[(triton.cdiv(x.numel(), 1024),)](
                x, y, weight, to, x.numel(), BLOCK=1024, num_warps=4
            )
    return out
