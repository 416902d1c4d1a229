"""consistency_loss: a row of both logits a program, blocks of classes at a time.

Pass 1: the log-sum-exps, online. Pass 2, whose blocks come from the L2 cache: J as a sum of
(p - q) D and both KLs; then the gradients, if asked for early. The backward kernel has four numbers
a row and makes p and q again. Memory, with backward: 4 M V elements read, 2 M V written; early: 2
M V read from memory, 2 M V written, and once more when they are scaled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _pair(z1_ptr, z2_ptr, column, there, lse1, lse2):
    """p, q and D of a block; D is 0 where neither has a probability, as beyond the row."""
    a = tl.load(z1_ptr + column, mask=there, other=float("-inf")).to(tl.float32)
    b = tl.load(z2_ptr + column, mask=there, other=float("-inf")).to(tl.float32)
    p = tl.exp(a - lse1)
    q = tl.exp(b - lse2)
    gap = tl.where((p == 0) & (q == 0), 0.0, (a - b) - (lse1 - lse2))
    return p, q, gap


@triton.jit
def _write_gradients(
    z1_ptr, z2_ptr, grad1_ptr, grad2_ptr, n, label, lse1, lse2, kl_pq, kl_qp, alpha, smoothing,
    scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale (p - t + alpha/2 (p (D - KL(p||q)) + p - q)) and its mirror image, for a whole row."""
    for c in range(0, n, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = column < n
        p, q, gap = _pair(z1_ptr, z2_ptr, column, there, lse1, lse2)
        wanted = smoothing / n + tl.where(column == label, 1.0 - smoothing, 0.0)
        pd = tl.where(p == 0, 0.0, p * (gap - kl_pq))
        qd = tl.where(q == 0, 0.0, q * (gap + kl_qp))
        first = scale * (p - wanted + 0.5 * alpha * (pd + (p - q)))
        second = scale * (q - wanted + 0.5 * alpha * ((q - p) - qd))
        tl.store(grad1_ptr + column, first.to(grad1_ptr.dtype.element_ty), mask=there)
        tl.store(grad2_ptr + column, second.to(grad2_ptr.dtype.element_ty), mask=there)


@triton.jit
def _write_zeros(grad1_ptr, grad2_ptr, n, BLOCK: tl.constexpr):
    for c in range(0, n, BLOCK):
        column = c + tl.arange(0, BLOCK)
        zero = tl.zeros((BLOCK,), tl.float32)
        tl.store(grad1_ptr + column, zero.to(grad1_ptr.dtype.element_ty), mask=column < n)
        tl.store(grad2_ptr + column, zero.to(grad2_ptr.dtype.element_ty), mask=column < n)


@triton.jit
def _consistency_kernel(
    z1_ptr,  # (M, V)
    z2_ptr,  # (M, V)
    target_ptr,  # (M,) int64
    kept_ptr,  # () int64: rows that count, read if EARLY and MEAN
    rows_ptr,  # (M,) float32: losses of the rows
    stats_ptr,  # (M, 4) float32
    grad1_ptr,  # (M, V), written if EARLY
    grad2_ptr,
    n,
    alpha,
    smoothing,
    ignore,
    EARLY: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + m)
    z1_ptr += m * n
    z2_ptr += m * n
    if label == ignore:
        tl.store(rows_ptr + m, 0.0)
        for i in tl.static_range(4):
            tl.store(stats_ptr + m * 4 + i, 0.0)
        if EARLY:
            _write_zeros(grad1_ptr + m * n, grad2_ptr + m * n, n, BLOCK)
    else:
        top1 = float("-inf")
        top2 = float("-inf")
        sum1 = 0.0
        sum2 = 0.0
        all_z = 0.0
        for c in range(0, n, BLOCK):
            column = c + tl.arange(0, BLOCK)  # (BLOCK,)
            there = column < n
            a = tl.load(z1_ptr + column, mask=there, other=float("-inf")).to(tl.float32)
            b = tl.load(z2_ptr + column, mask=there, other=float("-inf")).to(tl.float32)
            high1 = tl.maximum(top1, tl.max(a, 0))
            high2 = tl.maximum(top2, tl.max(b, 0))
            base1 = tl.where(high1 == float("-inf"), 0.0, high1)
            base2 = tl.where(high2 == float("-inf"), 0.0, high2)
            sum1 = sum1 * tl.exp(top1 - base1) + tl.sum(tl.exp(a - base1), 0)
            sum2 = sum2 * tl.exp(top2 - base2) + tl.sum(tl.exp(b - base2), 0)
            all_z += tl.sum(tl.where(there, a + b, 0.0), 0)
            top1 = high1
            top2 = high2
        lse1 = top1 + tl.log(sum1)
        lse2 = top2 + tl.log(sum2)
        jeffreys = 0.0
        kl_pq = 0.0
        kl_qp = 0.0
        for c in range(0, n, BLOCK):
            column = c + tl.arange(0, BLOCK)
            p, q, gap = _pair(z1_ptr, z2_ptr, column, column < n, lse1, lse2)
            jeffreys += tl.sum(tl.where(p == q, 0.0, (p - q) * gap), 0)
            kl_pq += tl.sum(tl.where(p == 0, 0.0, p * gap), 0)
            kl_qp -= tl.sum(tl.where(q == 0, 0.0, q * gap), 0)
        valid = (label >= 0) & (label < n)
        picked = tl.load(z1_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
        picked += tl.load(z2_ptr + label, mask=valid, other=float("nan")).to(tl.float32)
        loss = alpha * 0.5 * jeffreys - (1.0 - smoothing) * (picked - lse1 - lse2)
        if smoothing != 0.0:
            loss -= smoothing * (all_z / n - lse1 - lse2)
        tl.store(rows_ptr + m, loss)
        tl.store(stats_ptr + m * 4, lse1)
        tl.store(stats_ptr + m * 4 + 1, lse2)
        tl.store(stats_ptr + m * 4 + 2, kl_pq)
        tl.store(stats_ptr + m * 4 + 3, kl_qp)
        if EARLY:
            scale = 1.0
            if MEAN:
                scale = 1.0 / tl.load(kept_ptr).to(tl.float32)
            _write_gradients(
                z1_ptr, z2_ptr, grad1_ptr + m * n, grad2_ptr + m * n, n, label, lse1, lse2, kl_pq,
                kl_qp, alpha, smoothing, scale, BLOCK,
            )  # fmt: skip


@triton.jit
def _consistency_backward_kernel(
    grad_ptr,  # () or (M,) float32
    z1_ptr,  # (M, V)
    z2_ptr,
    target_ptr,  # (M,) int64
    kept_ptr,  # () int64
    stats_ptr,  # (M, 4)
    grad1_ptr,  # (M, V)
    grad2_ptr,
    n,
    alpha,
    smoothing,
    ignore,
    EACH: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    label = tl.load(target_ptr + m)
    scale = tl.load(grad_ptr + (m if EACH else 0)).to(tl.float32)
    if MEAN:
        scale = scale / tl.maximum(tl.load(kept_ptr), 1).to(tl.float32)
    if (label == ignore) | (scale == 0.0):
        _write_zeros(grad1_ptr + m * n, grad2_ptr + m * n, n, BLOCK)
    else:
        lse1 = tl.load(stats_ptr + m * 4)
        lse2 = tl.load(stats_ptr + m * 4 + 1)
        kl_pq = tl.load(stats_ptr + m * 4 + 2)
        kl_qp = tl.load(stats_ptr + m * 4 + 3)
        _write_gradients(
            z1_ptr + m * n, z2_ptr + m * n, grad1_ptr + m * n, grad2_ptr + m * n, n, label, lse1,
            lse2, kl_pq, kl_qp, alpha, smoothing, scale, BLOCK,
        )  # fmt: skip


def _shape(classes: int) -> dict:
    block = min(2048, max(16, triton.next_power_of_2(classes)))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4}


def consistency_loss_forward(
    logits1: Tensor, logits2: Tensor, target: Tensor, alpha: float, label_smoothing: float,
    ignore_index: int, reduction: str, early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(M, V) twice -> () or (M,), (M, 4), and (M, V) twice if early"""
    m, classes = logits1.shape
    rows = torch.empty((m,), dtype=torch.float32, device=logits1.device)
    stats = torch.empty((m, 4), dtype=torch.float32, device=logits1.device)
    made = [torch.empty_like(logits1) if early else logits1.new_empty((0, classes)) for _ in "12"]
    kept = (target != ignore_index).sum()  # () stays on the device
    if m:
        _consistency_kernel[(m,)](
            logits1, logits2, target, kept, rows, stats, *made, classes, alpha, label_smoothing,
            ignore_index, EARLY=early, MEAN=reduction == "mean", **_shape(classes),
        )  # fmt: skip
    if reduction == "none":
        return rows, stats, *made
    loss = rows.sum(dtype=torch.float64)
    if reduction == "mean":
        loss = loss / kept.clamp(min=1)
    return loss.float(), stats, *made


def consistency_loss_backward(
    grad_loss: Tensor, logits1: Tensor, logits2: Tensor, target: Tensor, stats: Tensor,
    early1: Tensor, early2: Tensor, alpha: float, label_smoothing: float, ignore_index: int,
    reduction: str, early: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """() or (M,) -> (M, V) twice"""
    if early:
        scale = grad_loss[:, None] if reduction == "none" else grad_loss
        return (early1 * scale).to(early1.dtype), (early2 * scale).to(early2.dtype)
    grads = torch.empty_like(logits1), torch.empty_like(logits2)
    if logits1.numel():
        kept = (target != ignore_index).sum()
        m, classes = logits1.shape
        _consistency_backward_kernel[(m,)](
            grad_loss, logits1, logits2, target, kept, stats, *grads, classes, alpha,
            label_smoothing, ignore_index, EACH=reduction == "none", MEAN=reduction == "mean",
            **_shape(classes),
        )  # fmt: skip
    return grads
