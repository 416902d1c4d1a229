"""What the kernels of pairs of rows share: a tile of cosines, which of it counts, its size."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

ROWS, KEYS, DEPTH = 64, 64, 32  # a tile, and the part of D of one product
WIDTH = 128  # columns of a gradient that a program holds
_PROGRAMS = 128  # at least, if there are keys enough to share
FIXED = 0.025  # lowest temperature at which e^{-2 / t} is a normal float32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # it has no bfloat16 products


@triton.jit
def cosines(
    x_ptr, y_ptr, i, j, m, n, d, x_inverse_ptr, y_inverse_ptr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
    RAW: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x_i.y_j, (BLOCK_M, BLOCK_N) float32, of rows i (BLOCK_M,) and j (BLOCK_N,)."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, d, DEPTH):
        at = k + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + i[:, None] * d + at[None, :],
            mask=(i < m)[:, None] & (at < d)[None, :],
            other=0.0,
        )
        y = tl.load(
            y_ptr + j[None, :] * d + at[:, None],
            mask=(j < n)[None, :] & (at < d)[:, None],
            other=0.0,
        )
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        s = tl.dot(x, y, s, input_precision=PRECISION)
    if RAW:
        s *= tl.load(x_inverse_ptr + i, mask=i < m, other=0.0)[:, None]
        s *= tl.load(y_inverse_ptr + j, mask=j < n, other=0.0)[None, :]
    return s


@triton.jit
def local_of(key, start, BLOCK_N: tl.constexpr):
    """A key's place in the tile that begins at `start`, as a small number; outside: no place."""
    return tl.minimum(tl.maximum(key - start, -1), BLOCK_N).to(tl.int32)


@triton.jit
def kept(
    i, j, m, n, row_code, key_code, positive, local,
    VIEWS: tl.constexpr, WITHIN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """keep (BLOCK_M, BLOCK_N): VIEWS: rows and keys are two views each, the second from m / 2 and
    n / 2 on; WITHIN: pairs within a view count; ACROSS: one subject's across views do not.
    positive: its place in the tile."""
    keep = (i < m)[:, None] & (j < n)[None, :]
    if VIEWS:
        across = (i >= m // 2)[:, None] != (j >= n // 2)[None, :]
        other = row_code[:, None] != key_code[None, :]
        allowed = across
        if ACROSS:
            allowed = across & (other | (positive[:, None] == local[None, :]))
        if WITHIN:
            allowed = allowed | (other & (across == 0))
        keep = keep & allowed
    return keep


def block_of(d: int) -> int:
    return min(1024, max(32, triton.next_power_of_2(d)))


def precision_of(dtype: torch.dtype) -> str:
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def parts_of(m: int, n: int) -> tuple[int, int]:
    """(parts, keys of a part): so many that the programs are enough; by the sizes alone."""
    blocks = triton.cdiv(n, KEYS)
    parts = min(blocks, max(1, _PROGRAMS // triton.cdiv(m, ROWS)))
    chunk = triton.cdiv(blocks, parts) * KEYS
    return triton.cdiv(n, chunk), chunk
