"""A learned router's gate and losses: a program has a few rows of E logits in registers.

Sums over rows are written per program and added by torch, in order: no atomics on floats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load_rows(z_ptr, rows, n, ROWS: tl.constexpr, E: tl.constexpr):
    """Row numbers, columns, mask, logits in float32 (-inf beyond the row)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # (ROWS,)
    column = tl.arange(0, E)  # (E,)
    there = (row < rows)[:, None] & (column < n)[None, :]
    z = tl.load(z_ptr + row[:, None] * n + column[None, :], mask=there, other=float("-inf"))
    return row, column, there, z.to(tl.float32)


@triton.jit
def _exponentials(z, there):
    """exp(z - max) (ROWS, E), 0 beyond the row; its sums and the maxima (ROWS,)."""
    top = tl.max(z, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    e = tl.where(there, tl.exp(z - top[:, None]), 0.0)
    return e, tl.sum(e, 1), top


@triton.jit
def _topk_gate_kernel(
    z_ptr,  # (T, E)
    idx_ptr,  # (T, k)
    weights_ptr,  # (T, k) float32
    rows,
    n,
    k,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    inside = row < rows
    e, total, _ = _exponentials(z, there)
    if NORMALIZE:
        total = tl.zeros((ROWS,), tl.float32)
    key = tl.where(z != z, float("inf"), z)
    free = there
    for j in range(k):
        best = tl.max(tl.where(free, key, float("-inf")), 1)  # (ROWS,)
        equal = free & (key == best[:, None])
        pick = tl.min(tl.where(equal, column[None, :], E), 1)
        mine = column[None, :] == pick[:, None]
        weight = tl.sum(tl.where(mine, e, 0.0), 1)
        if NORMALIZE:
            total += weight
        tl.store(idx_ptr + row * k + j, pick, mask=inside)
        tl.store(weights_ptr + row * k + j, weight, mask=inside)
        free = free & (column[None, :] != pick[:, None])
    for j in range(k):
        weight = tl.load(weights_ptr + row * k + j, mask=inside, other=0.0)
        tl.store(weights_ptr + row * k + j, weight / total, mask=inside)


@triton.jit
def _topk_gate_backward_kernel(
    dw_ptr,  # (T, k) float32
    z_ptr,  # (T, E)
    idx_ptr,  # (T, k)
    dz_ptr,  # (T, E)
    rows,
    n,
    k,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    inside = row < rows
    e, total, _ = _exponentials(z, there)
    dp = tl.zeros((ROWS, E), tl.float32)
    chosen = tl.zeros((ROWS, E), tl.float32)
    for j in range(k):
        pick = tl.load(idx_ptr + row * k + j, mask=inside, other=-1)
        mine = column[None, :] == pick[:, None]
        incoming = tl.load(dw_ptr + row * k + j, mask=inside, other=0.0)
        dp = tl.where(mine, incoming[:, None], dp)
        chosen = tl.where(mine, 1.0, chosen)
    if NORMALIZE:
        e = e * chosen
        total = tl.sum(e, 1)
    p = e / tl.where(inside, total, 1.0)[:, None]
    dz = p * (dp - tl.sum(p * dp, 1)[:, None])
    tl.store(
        dz_ptr + row[:, None] * n + column[None, :], dz.to(dz_ptr.dtype.element_ty), mask=there
    )


@triton.jit
def _balance_kernel(
    z_ptr,  # (T, E)
    ids_ptr,  # (T, k)
    sums_ptr,  # (programs, E) float32: probabilities
    counts_ptr,  # (programs, E) int32: choices
    rows,
    n,
    k,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    e, total, _ = _exponentials(z, there)
    p = e / tl.where(row < rows, total, 1.0)[:, None]
    counts = tl.zeros((ROWS, E), tl.int32)
    for j in range(k):
        pick = tl.load(ids_ptr + row * k + j, mask=row < rows, other=-1)
        counts += (column[None, :] == pick[:, None]).to(tl.int32)
    at = tl.program_id(0).to(tl.int64) * n + column
    tl.store(sums_ptr + at, tl.sum(p, 0), mask=column < n)
    tl.store(counts_ptr + at, tl.sum(counts, 0), mask=column < n)


@triton.jit
def _balance_backward_kernel(
    grad_ptr,  # () float32
    z_ptr,  # (T, E)
    share_ptr,  # (E,) float32
    dz_ptr,  # (T, E)
    rows,
    n,
    scale,  # E / T
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    e, total, _ = _exponentials(z, there)
    p = e / tl.where(row < rows, total, 1.0)[:, None]
    share = tl.load(share_ptr + column, mask=column < n, other=0.0)[None, :]
    mean = tl.sum(p * share, 1)
    dz = tl.load(grad_ptr) * scale * p * (share - mean[:, None])
    tl.store(
        dz_ptr + row[:, None] * n + column[None, :], dz.to(dz_ptr.dtype.element_ty), mask=there
    )


@triton.jit
def _z_kernel(
    z_ptr,  # (T, E)
    sums_ptr,  # (programs,) float32: squares of lse
    rows,
    n,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, _column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    _e, total, top = _exponentials(z, there)
    lse = tl.where(row < rows, top + tl.log(tl.where(row < rows, total, 1.0)), 0.0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64), tl.sum(lse * lse, 0))


@triton.jit
def _z_backward_kernel(
    grad_ptr,  # () float32
    z_ptr,  # (T, E)
    dz_ptr,  # (T, E)
    rows,
    n,
    scale,  # 2 / T
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    row, column, there, z = _load_rows(z_ptr, rows, n, ROWS, E)
    e, total, top = _exponentials(z, there)
    total = tl.where(row < rows, total, 1.0)
    factor = tl.load(grad_ptr) * scale * (top + tl.log(total)) / total
    dz = e * factor[:, None]
    tl.store(
        dz_ptr + row[:, None] * n + column[None, :], dz.to(dz_ptr.dtype.element_ty), mask=there
    )


def _shape(logits: Tensor) -> dict:
    """About 2048 logits a program."""
    padded = max(2, triton.next_power_of_2(logits.shape[1]))
    return {"ROWS": max(1, 2048 // padded), "E": padded, "num_warps": 4}


def _grid(logits: Tensor) -> tuple[int]:
    return (triton.cdiv(logits.shape[0], _shape(logits)["ROWS"]),)


def _too_wide(logits: Tensor) -> str | None:
    n = logits.shape[1]
    return None if n <= 8192 else f"holds a row of at most 8192 logits in registers, got {n}"


def topk_gate_supports(logits, k, normalize) -> str | None:
    return _too_wide(logits)


def topk_gate_forward(logits: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """(T, E) -> (T, k) int32, (T, k) float32"""
    rows, n = logits.shape
    idx = torch.empty((rows, k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((rows, k), dtype=torch.float32, device=logits.device)
    if rows:
        _topk_gate_kernel[_grid(logits)](
            logits, idx, weights, rows, n, k, NORMALIZE=normalize, **_shape(logits)
        )
    return idx, weights


def topk_gate_backward(
    grad_weights: Tensor, logits: Tensor, idx: Tensor, normalize: bool
) -> Tensor:
    """(T, k) -> (T, E)"""
    grad = torch.empty_like(logits)
    if grad.numel():
        _topk_gate_backward_kernel[_grid(logits)](
            grad_weights, logits, idx, grad, *logits.shape, idx.shape[1], NORMALIZE=normalize,
            **_shape(logits),
        )  # fmt: skip
    return grad


def load_balancing_loss_supports(logits, expert_idx) -> str | None:
    return _too_wide(logits)


def load_balancing_loss_forward(logits: Tensor, expert_idx: Tensor) -> tuple[Tensor, Tensor]:
    """(T, E), (T, k) -> (), (E,)"""
    (rows, n), grid = logits.shape, _grid(logits)
    sums = torch.empty((*grid, n), dtype=torch.float32, device=logits.device)
    counts = torch.empty((*grid, n), dtype=torch.int32, device=logits.device)
    if rows:
        _balance_kernel[grid](
            logits, expert_idx, sums, counts, rows, n, expert_idx.shape[1], **_shape(logits)
        )
    share = counts.sum(0).float() / max(1, expert_idx.numel())
    mean = sums.sum(0, dtype=torch.float64) / max(1, rows)
    return (n * (share.double() * mean).sum()).float(), share


def load_balancing_loss_backward(grad_loss: Tensor, logits: Tensor, share: Tensor) -> Tensor:
    """() -> (T, E)"""
    grad = torch.empty_like(logits)
    if grad.numel():
        _balance_backward_kernel[_grid(logits)](
            grad_loss, logits, share, grad, *logits.shape, logits.shape[1] / logits.shape[0],
            **_shape(logits),
        )  # fmt: skip
    return grad


def router_z_loss_supports(logits) -> str | None:
    return _too_wide(logits)


def router_z_loss_forward(logits: Tensor) -> Tensor:
    """(T, E) -> ()"""
    sums = torch.empty(_grid(logits), dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _z_kernel[_grid(logits)](logits, sums, *logits.shape, **_shape(logits))
    return (sums.sum(dtype=torch.float64) / max(1, logits.shape[0])).float()


def router_z_loss_backward(grad_loss: Tensor, logits: Tensor) -> Tensor:
    """() -> (T, E)"""
    grad = torch.empty_like(logits)
    if grad.numel():
        _z_backward_kernel[_grid(logits)](
            grad_loss, logits, grad, *logits.shape, 2 / logits.shape[0], **_shape(logits)
        )
    return grad
