"""Triton kernels of the family `aggregate`, for one tensor (p, d) of stacked rows.

Lists of tensors go to the CUDA kernels, which take pointers by value.

    gram     K = X X^T as tiles of a matrix product: p is padded to 16 or more, coordinates are the
             inner dimension. 16-bit rows are exact in TF32, float32 rows take three TF32 products.
             Tensor cores cut off, not round, when they add, so only one tile's product is summed
             there, and tiles in float64; the programs' matrices are added by one torch reduction.
             Where a square leaves float32's range a second kernel repeats it in float64.
    combine  u = c^T X, a row at a time in registers; chunks from the last to the first, because
             gram read forwards and left the last ones in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 2048  # coordinates of a program, at least
_WIDE = 128  # programs of the float64 pass


@triton.jit
def _gram_forward_kernel(
    x_ptr,  # (p, d)
    mask_ptr,  # (p,) bool, read if HAS_MASK
    partial_ptr,  # (programs, P, P) float64
    p,
    d,
    chunk,  # coordinates of a program, a multiple of BLOCK
    P: tl.constexpr,  # p padded to a power of two, at least 16
    BLOCK: tl.constexpr,  # coordinates of one product
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,  # "tf32" holds 16-bit floats exactly; float32 needs "tf32x3"
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, P)  # (P,)
    live = row < p
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + row, mask=live, other=0) != 0)
    base = x_ptr + row.to(tl.int64)[:, None] * d  # (P, 1)
    begin = program * chunk
    end = tl.minimum(begin + chunk, d)
    total = tl.zeros((P, P), tl.float64)
    for k in range(begin, end, BLOCK):
        column = k + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = live[:, None] & (column < end)[None, :]  # (P, BLOCK)
        x = tl.load(base + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.dot(x, tl.trans(x), input_precision=PRECISION).to(tl.float64)
    at = partial_ptr + program * P * P + row[:, None] * P + row[None, :]
    tl.store(at, total)


@triton.jit
def _gram_wide_kernel(
    x_ptr,  # (p, d)
    mask_ptr,  # (p,) bool, read if HAS_MASK
    k_ptr,  # (p, p) float64, what _gram_forward_kernel found
    partial_ptr,  # (programs, P, P) float64
    p,
    d,
    smallest,  # a sum of d squares below this may have lost digits to underflow
    P: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """The same with every product in float64, if a square left float32's range; else zeros. A
    coordinate at a time, by few programs: this is rarely asked."""
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, P)  # (P,)
    live = row < p
    if HAS_MASK:
        live = live & (tl.load(mask_ptr + row, mask=live, other=0) != 0)
    square = tl.load(k_ptr + row * p + row, mask=live, other=1.0)
    fine = (square >= smallest) & (square <= 1.7976931348623157e308)
    total = tl.zeros((P, P), tl.float64)
    if tl.sum(tl.where(fine, 0, 1)) > 0:
        for k in range(program, d, tl.num_programs(0)):
            x = tl.load(x_ptr + row.to(tl.int64) * d + k, mask=live, other=0.0).to(tl.float64)
            total += x[:, None] * x[None, :]
    tl.store(partial_ptr + program * P * P + row[:, None] * P + row[None, :], total)


@triton.jit
def _combine_forward_kernel(
    x_ptr,  # (p, d)
    coeffs_ptr,  # (p,) float64
    out_ptr,  # (d,)
    p,
    d,
    BLOCK: tl.constexpr,
):
    program = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    column = program * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = column < d
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(p):
        c = tl.load(coeffs_ptr + i).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)  # (BLOCK,)
        # A row with c = 0 is not read: its NaN must not leak.
        x = tl.load(x_ptr + tl.cast(i, tl.int64) * d + column, mask=inside & (c != 0), other=0.0)
        total += c * x.to(tl.float32)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def _stacked(grads: list[Tensor]) -> str | None:
    return None if len(grads) == 1 else "takes one stacked tensor (p, ...), got a list"


def gram_supports(grads: list[Tensor], mask: Tensor | None, p: int, accum: str) -> str | None:
    if accum != "fp32":
        return f"sums in float32 (accum='fp32'), got accum={accum!r}"
    if p > 128:
        return f"takes at most 128 workers, got {p}"
    return _stacked(grads)


def gram_forward(grads: list[Tensor], mask: Tensor | None, p: int, accum: str) -> Tensor:
    """[(p, ...)] -> K (p, p) float64."""
    x = grads[0]
    d = x.numel() // p
    if d == 0:
        return x.new_zeros((p, p), dtype=torch.float64)
    padded = max(16, triton.next_power_of_2(p))
    # 512 programs keep every multiprocessor busy; d alone decides, so that bits do not change
    # from one GPU to the next.
    chunk = triton.cdiv(d, 512 * _CHUNK) * _CHUNK
    programs = triton.cdiv(d, chunk)
    partial = torch.empty((programs, padded, padded), dtype=torch.float64, device=x.device)
    _gram_forward_kernel[(programs,)](
        x, x if mask is None else mask, partial, p, d, chunk,
        P=padded, BLOCK=128 if padded <= 32 else 64, HAS_MASK=mask is not None,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    k = partial.sum(0)[:p, :p].contiguous()
    smallest = 1e-30 * d
    wide = torch.empty((_WIDE, padded, padded), dtype=torch.float64, device=x.device)
    _gram_wide_kernel[(_WIDE,)](
        x, x if mask is None else mask, k, wide, p, d, smallest,
        P=padded, HAS_MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    squares = k.diagonal() if mask is None else k.diagonal().where(mask, 1.0)
    fine = ((squares >= smallest) & torch.isfinite(squares)).all()
    return torch.where(fine, k, wide.sum(0)[:p, :p])


def combine_supports(grads: list[Tensor], coeffs: Tensor, p: int) -> str | None:
    return _stacked(grads)


def combine_forward(
    grads: list[Tensor], coeffs: Tensor, p: int, out: list[Tensor] | None = None
) -> list[Tensor]:
    """[(p, ...)], (p,) float64 -> [(d,)]"""
    x = grads[0]
    d = x.numel() // p
    out = [torch.empty((d,), dtype=x.dtype, device=x.device)] if out is None else out
    if d > 0:
        block = 1024
        _combine_forward_kernel[(triton.cdiv(d, block),)](
            x, coeffs, out[0], p, d, BLOCK=block, num_warps=4
        )
    return out
