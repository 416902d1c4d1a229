"""What the Triton kernels of the family `contrastive` on grouped rows share: tiles of products.

Rows are float32, normalised once by torch. A program owns a block of rows and walks over blocks of
columns; nothing of the N x N matrix leaves the registers, and sums have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, INNER = 64, 64, 32  # a tile, and the coordinates of one product
NARROW = 32  # columns, where more numbers belong to a pair than registers hold for 64
SLICE = 64  # coordinates of a gradient that a program owns


@triton.jit
def tile(
    a_ptr,  # (a_rows, d)
    b_ptr,  # (b_rows, d)
    row,  # (M,) int64
    column,  # (N,) int64
    a_rows,
    b_rows,
    d,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a_i . b_j (M, N)"""
    s = tl.zeros((M, N), tl.float32)
    for k in range(0, d, INNER):
        at = k + tl.arange(0, INNER)  # (INNER,)
        inside = at < d
        a = tl.load(
            a_ptr + row[:, None] * d + at[None, :],
            mask=(row < a_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            b_ptr + column[None, :] * d + at[:, None],
            mask=(column < b_rows)[None, :] & inside[:, None],
            other=0.0,
        )
        s += tl.dot(a, b, input_precision=PRECISION)
    return s


@triton.jit
def add_product(
    total,  # (M, SLICE)
    weights,  # (M, N)
    b_ptr,  # (b_rows, d)
    column,  # (N,) int64
    place,  # (SLICE,) coordinates
    b_rows,
    d,
    PRECISION: tl.constexpr,
):
    """total + weights b"""
    b = tl.load(
        b_ptr + column[:, None] * d + place[None, :],
        mask=(column < b_rows)[:, None] & (place < d)[None, :],
        other=0.0,
    )
    return total + tl.dot(weights, b, input_precision=PRECISION)


def precision_of(rows: Tensor, normalize: bool) -> str:
    """16-bit rows are exact in TF32; float32 rows take three TF32 products, unless torch allows
    less (torch.set_float32_matmul_precision)."""
    if rows.dtype != torch.float32 and not normalize:
        return "tf32"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def unit(rows: Tensor, normalize: bool) -> Tensor:
    """(N, d) float32, contiguous; divided by max(|row|, 1e-12) if asked for."""
    wide = rows.float()
    if normalize:
        wide = torch.nn.functional.normalize(wide, dim=1, eps=1e-12)
    return wide.contiguous()


def project(grad: Tensor, rows: Tensor, normalize: bool) -> Tensor:
    """dL/drow from dL/du: (g - u (u.g)) / |row|, g / 1e-12 where the row is shorter."""
    if not normalize:
        return grad.to(rows.dtype)
    wide = rows.float()
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    u = wide / norm.clamp_min(1e-12)
    along = torch.where(norm >= 1e-12, (u * grad).sum(1, keepdim=True), 0)
    return ((grad - u * along) / norm.clamp_min(1e-12)).to(rows.dtype)


def too_many_rows(count: int) -> str | None:
    return None if count < 1 << 31 else f"takes fewer than 2^31 rows, got {count}"
