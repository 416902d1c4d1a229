"""Rows moved through a plan: a program moves 8 slots or tokens, a stretch of columns at a time.

The k choices of a token are gathered and summed in float32, in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8  # slots or tokens of a program


def columns(d: int) -> int:
    """Columns of a step."""
    return min(1024, max(16, triton.next_power_of_2(d)))


@triton.jit
def _permute_kernel(
    x_ptr,  # (T, d)
    order_ptr,  # (R,)
    xp_ptr,  # (R, d)
    slots,
    d,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    inside = row < slots
    flat = tl.load(order_ptr + row, mask=inside, other=-1)
    token = (flat // k).to(tl.int64)
    for c in range(0, d, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = (column < d)[None, :]
        x = tl.load(
            x_ptr + token[:, None] * d + column[None, :],
            mask=(flat >= 0)[:, None] & there,
            other=0.0,
        )
        tl.store(xp_ptr + row[:, None] * d + column[None, :], x, mask=inside[:, None] & there)


@triton.jit
def _sum_rows_kernel(
    h_ptr,  # (R, d)
    rank_ptr,  # (T, k)
    weights_ptr,  # (T, k), read if HAS_WEIGHTS
    y_ptr,  # (T, d)
    tokens,
    d,
    k,
    scale,  # of every row
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    inside = token < tokens
    for c in range(0, d, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = (column < d)[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for j in range(k):
            slot = tl.load(rank_ptr + token * k + j, mask=inside, other=-1).to(tl.int64)
            live = slot >= 0
            h = tl.load(
                h_ptr + slot[:, None] * d + column[None, :], mask=live[:, None] & there, other=0.0
            ).to(tl.float32)
            if HAS_WEIGHTS:
                w = tl.load(weights_ptr + token * k + j, mask=live, other=0.0).to(tl.float32)
                h = h * w[:, None]
            total += h
        y = (total * scale).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + token[:, None] * d + column[None, :], y, mask=inside[:, None] & there)


@triton.jit
def _spread_rows_kernel(
    dy_ptr,  # (T, d)
    order_ptr,  # (R,)
    weights_ptr,  # (T, k), read if HAS_WEIGHTS
    dh_ptr,  # (R, d)
    slots,
    d,
    k,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    inside = row < slots
    flat = tl.load(order_ptr + row, mask=inside, other=-1).to(tl.int64)
    live = flat >= 0
    token = flat // k
    w = tl.zeros((ROWS,), tl.float32) + 1.0
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + flat, mask=live, other=0.0).to(tl.float32)
    for c in range(0, d, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = (column < d)[None, :]
        dy = tl.load(
            dy_ptr + token[:, None] * d + column[None, :], mask=live[:, None] & there, other=0.0
        ).to(tl.float32)
        dh = (dy * w[:, None]).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + row[:, None] * d + column[None, :], dh, mask=inside[:, None] & there)


@triton.jit
def _dot_rows_kernel(
    h_ptr,  # (R, d)
    dy_ptr,  # (T, d)
    rank_ptr,  # (T, k)
    dw_ptr,  # (T, k)
    choices,  # T * k
    d,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    flat = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    inside = flat < choices
    slot = tl.load(rank_ptr + flat, mask=inside, other=-1).to(tl.int64)
    live = slot >= 0
    total = tl.zeros((ROWS,), tl.float32)
    for c in range(0, d, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = live[:, None] & (column < d)[None, :]
        h = tl.load(h_ptr + slot[:, None] * d + column[None, :], mask=there, other=0.0)
        dy = tl.load(dy_ptr + (flat // k)[:, None] * d + column[None, :], mask=there, other=0.0)
        total += tl.sum(h.to(tl.float32) * dy.to(tl.float32), 1)
    tl.store(dw_ptr + flat, total.to(dw_ptr.dtype.element_ty), mask=inside)


def permute_forward(x: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """(T, d) -> (R, d)"""
    slots, d = order.shape[0], x.shape[1]
    xp = torch.empty((slots, d), dtype=x.dtype, device=x.device)
    if xp.numel():
        _permute_kernel[(triton.cdiv(slots, _ROWS),)](
            x, order, xp, slots, d, rank.shape[1], ROWS=_ROWS, BLOCK=columns(d), num_warps=4
        )
    return xp


def sum_rows(h: Tensor, rank: Tensor, weights: Tensor | None, scale: float = 1.0) -> Tensor:
    (tokens, k), d = rank.shape, h.shape[1]
    y = torch.empty((tokens, d), dtype=h.dtype, device=h.device)
    if y.numel():
        _sum_rows_kernel[(triton.cdiv(tokens, _ROWS),)](
            h, rank, h if weights is None else weights, y, tokens, d, k, scale,
            HAS_WEIGHTS=weights is not None, ROWS=_ROWS, BLOCK=min(512, columns(d)), num_warps=4,
        )  # fmt: skip
    return y


def permute_backward(grad_xp: Tensor, order: Tensor, rank: Tensor) -> Tensor:
    """(R, d) -> (T, d)"""
    return sum_rows(grad_xp, rank, None)


def unpermute_forward(h: Tensor, order: Tensor, rank: Tensor, weights: Tensor | None) -> Tensor:
    """(R, d) -> (T, d)"""
    return sum_rows(h, rank, weights)


def unpermute_backward(
    grad_y: Tensor, h: Tensor, order: Tensor, rank: Tensor, weights: Tensor | None, needs_grad
) -> tuple[Tensor | None, Tensor | None]:
    """(T, d) -> (R, d) and (T, k)"""
    (tokens, k), slots, d = rank.shape, order.shape[0], h.shape[1]
    grad_h = grad_weights = None
    if needs_grad[0]:
        grad_h = torch.empty_like(h)
        if grad_h.numel():
            _spread_rows_kernel[(triton.cdiv(slots, _ROWS),)](
                grad_y, order, h if weights is None else weights, grad_h, slots, d, k,
                HAS_WEIGHTS=weights is not None, ROWS=_ROWS, BLOCK=columns(d), num_warps=4,
            )  # fmt: skip
    if needs_grad[3] and weights is not None:
        grad_weights = torch.empty_like(weights)
        if grad_weights.numel():
            _dot_rows_kernel[(triton.cdiv(tokens * k, _ROWS),)](
                h, grad_y, rank, grad_weights, tokens * k, d, k,
                ROWS=_ROWS, BLOCK=min(512, columns(d)), num_warps=4,
            )  # fmt: skip
    return grad_h, grad_weights
