"""Triton kernels of `focal_supcon_loss`, `hard_pair_indices` and `hard_pair_mixup`.

focal_supcon_loss   rows are ordered by group, those with a positive first. Sums of exponentials
                    over all columns (a constant shift where the rows' length is known to be 1,
                    else a running maximum); terms of the positives over the columns of the
                    block's groups alone; backward: a tile of weights, symmetric in row and
                    column, times the rows. Rows that are alone meet only those that are not.
hard_pair_indices   the least and the largest cosine of each row with their columns
hard_pair_mixup     a program per output row and slice; backward by lists of who was made of whom
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dashpot.triton_kernels.contrastive.tiles import (
    COLUMNS,
    INNER,
    NARROW,
    ROWS,
    SLICE,
    add_product,
    precision_of,
    project,
    tile,
    too_many_rows,
    unit,
)
from torch import Tensor


@triton.jit(do_not_specialize=["n"])
def _focal_sums_kernel(
    z_ptr,  # (n, d)
    paired_ptr,  # () int64, rows with a positive: the first ones
    lse_ptr,  # (n,) float32, written
    n,
    d,
    c,  # 1 / temperature
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    UNIT: tl.constexpr,  # rows have length 1 and exp(-2 c) is a normal number
    PRECISION: tl.constexpr,
):
    """lse_i = log sum_{k != i} exp(c s_ik), 0 for rows without a positive."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    paired = tl.load(paired_ptr)
    total = tl.zeros((M,), tl.float32)
    most = tl.zeros((M,), tl.float32) + (c if UNIT else float("-inf"))
    if tl.program_id(0).to(tl.int64) * M < paired:
        for j in range(0, n, N):
            column = (j + tl.arange(0, N)).to(tl.int64)  # (N,)
            s = tile(z_ptr, z_ptr, row, column, n, n, d, M, N, INNER, PRECISION)
            other = (row[:, None] != column[None, :]) & (column < n)[None, :]
            x = tl.where(other, s * c, float("-inf"))  # (M, N)
            if not UNIT:
                higher = tl.maximum(most, tl.max(x, 1))
                base = tl.where(higher > float("-inf"), higher, 0.0)
                total *= tl.exp(most - base)
                most = higher
                x -= base[:, None]
            else:
                x -= c
            total += tl.sum(tl.exp(x), 1)
    lse = tl.where(row < paired, most + tl.log(total), 0.0)
    tl.store(lse_ptr + row, lse, mask=row < n)


@triton.jit
def _focused(x, gamma, FOCUS: tl.constexpr):
    """q^gamma x and its slope gamma p q^(gamma - 1) x - q^gamma; p = e^x, q = 1 - p.

    FOCUS: 0, 1, 2 for that gamma, 3 for others."""
    p = tl.exp(x)
    if FOCUS == 0:
        value = x
        slope = x * 0 - 1
    else:
        series = x * 0 + 1.0  # of (e^x - 1) / x, for |x| <= 1/2
        for i in tl.static_range(8):
            series = 1.0 + series * x / (9 - i)
        q = tl.where(x > -0.5, -x * series, 1 - p)
        q = tl.where(q < 1.1754944e-38, 1.1754944e-38, q)
        if FOCUS == 1:
            value = q * x
            slope = p * x - q
        elif FOCUS == 2:
            value = q * q * x
            slope = 2 * q * p * x - q * q
        else:
            power = tl.exp(gamma * tl.log(q))
            value = power * x
            slope = gamma * p * tl.exp((gamma - 1) * tl.log(q)) * x - power
    return value, slope


@triton.jit(do_not_specialize=["n"])
def _focal_terms_kernel(
    z_ptr,  # (n, d)
    first_ptr,  # (n,) int64, first row of the group
    last_ptr,  # (n,) int64, one beyond its last
    lse_ptr,  # (n,) float32
    loss_ptr,  # (n,) float32, written: sum of q^gamma log p over the positives
    pull_ptr,  # (n,) float32, written: sum of the slopes
    n,
    d,
    c,
    gamma,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    FOCUS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    live = row < n
    first = tl.load(first_ptr + row, mask=live, other=0)
    last = tl.load(last_ptr + row, mask=live, other=0)
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    has = last - first > 1
    begin = tl.min(tl.where(has, first, n), 0)
    end = tl.max(tl.where(has, last, 0), 0)
    loss = tl.zeros((M,), tl.float32)
    pull = tl.zeros((M,), tl.float32)
    for j in range(begin, end, N):
        column = j + tl.arange(0, N).to(tl.int64)  # (N,)
        s = tile(z_ptr, z_ptr, row, column, n, n, d, M, N, INNER, PRECISION)
        positive = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        positive = positive & (column[None, :] != row[:, None])
        value, slope = _focused(tl.where(positive, s * c - lse[:, None], 0.0), gamma, FOCUS)
        loss += tl.sum(tl.where(positive, value, 0.0), 1)
        pull += tl.sum(tl.where(positive, slope, 0.0), 1)
    tl.store(loss_ptr + row, loss, mask=live)
    tl.store(pull_ptr + row, pull, mask=live)


@triton.jit(do_not_specialize=["n"])
def _focal_gradient_kernel(
    z_ptr,  # (n, d)
    first_ptr,  # (n,) int64
    last_ptr,  # (n,) int64
    paired_ptr,  # () int64
    lse_ptr,  # (n,) float32
    w_ptr,  # (n,) float32, c times what the reduction gives the row, 0 without a positive
    push_ptr,  # (n,) float32, w times the row's pull; UNIT: times exp(c - lse) as well
    grad_ptr,  # (n, d) float32, written
    n,
    d,
    c,
    gamma,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    SLICE: tl.constexpr,
    FOCUS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dU = W U, W_ij = w_i (slope_ij - p_ij h_i) + w_j (slope_ji - p_ji h_j)"""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    place = tl.program_id(1).to(tl.int64) * SLICE + tl.arange(0, SLICE)  # (SLICE,)
    live = row < n
    paired = tl.load(paired_ptr)
    first = tl.load(first_ptr + row, mask=live, other=0)
    last = tl.load(last_ptr + row, mask=live, other=0)
    row_lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    row_w = tl.load(w_ptr + row, mask=live, other=0.0)
    row_push = tl.load(push_ptr + row, mask=live, other=0.0)
    has = last - first > 1
    begin = tl.min(tl.where(has, first, n), 0)
    end = tl.max(tl.where(has, last, 0), 0)
    # Rows that are alone meet only rows that are not.
    columns = tl.where(tl.program_id(0).to(tl.int64) * M < paired, n, paired)
    total = tl.zeros((M, SLICE), tl.float32)
    for j in range(0, columns, N):
        column = j + tl.arange(0, N).to(tl.int64)  # (N,)
        there = column < n
        s = tile(z_ptr, z_ptr, row, column, n, n, d, M, N, INNER, PRECISION) * c
        lse = tl.load(lse_ptr + column, mask=there, other=0.0)
        push = tl.load(push_ptr + column, mask=there, other=0.0)
        if UNIT:
            weights = -tl.exp(s - c) * (row_push[:, None] + push[None, :])
        else:
            # Rows without a positive have no lse: their exponentials are not formed.
            own = tl.where(row_push != 0, row_push, 0.0)[:, None]
            other = tl.where(push != 0, push, 0.0)[None, :]
            weights = -own * tl.exp(tl.where(own != 0, s - row_lse[:, None], 0.0))
            weights -= other * tl.exp(tl.where(other != 0, s - lse[None, :], 0.0))
        if (j < end) & (j + N > begin):
            w = tl.load(w_ptr + column, mask=there, other=0.0)
            positive = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
            _, own_slope = _focused(tl.where(positive, s - row_lse[:, None], -1.0), gamma, FOCUS)
            _, its_slope = _focused(tl.where(positive, s - lse[None, :], -1.0), gamma, FOCUS)
            terms = row_w[:, None] * own_slope + w[None, :] * its_slope
            weights += tl.where(positive, terms, 0.0)
        weights = tl.where((row[:, None] != column[None, :]) & there[None, :], weights, 0.0)
        total = add_product(total, weights, z_ptr, column, place, n, d, PRECISION)
    at = grad_ptr + row[:, None] * d + place[None, :]
    tl.store(at, total, mask=live[:, None] & (place < d)[None, :])


def _ordered(groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows by group, those with a positive first: order (N,), first and last place of each one's
    group (N,), and how many have a positive ()."""
    ids, order = groups.sort(stable=True)
    first = torch.searchsorted(ids, ids)
    last = torch.searchsorted(ids, ids, right=True)
    alone = last - first == 1
    before = alone.cumsum(0) - alone.long()  # rows that are alone before each one
    shift = before.gather(0, first) if ids.numel() else before
    again = alone.long().sort(stable=True).indices
    place = torch.arange(ids.shape[0], device=ids.device)
    moved = alone.gather(0, again)
    first = torch.where(moved, place, (first - shift).gather(0, again))
    last = torch.where(moved, place + 1, (last - shift).gather(0, again))
    return order.gather(0, again), first, last, (~alone).sum()


def _focus_of(gamma: float) -> int:
    return {0.0: 0, 1.0: 1, 2.0: 2}.get(gamma, 3)


def _shares(first, last, paired, by_count: bool, all_anchors: bool, reduction: str) -> Tensor:
    """What each row's sum over its positives is multiplied by (N,)."""
    n = first.shape[0]
    share = 1 / (last - first - 1).clamp(min=1).float() if by_count else first.new_full(
        (n,), 1 / max(n, 1), dtype=torch.float32
    )  # fmt: skip
    if reduction == "mean":
        share = share / (max(n, 1) if all_anchors else paired.clamp(min=1))
    return torch.where(last - first > 1, share, 0)


def focal_supcon_loss_supports(z: Tensor, *_) -> str | None:
    return too_many_rows(z.shape[0])


def focal_supcon_loss_forward(
    z: Tensor, groups: Tensor, temperature: float, gamma: float, by_count: bool, all_anchors: bool,
    normalize: bool, reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, d), (N,) int64 -> loss () or (N,), lse (N,), pull (N,) and the gradient (N, d) or (0, d),
    all float32"""
    n, d = z.shape
    order, first, last, paired = _ordered(groups)
    u = unit(z, normalize)[order]
    lse = torch.empty((n,), dtype=torch.float32, device=z.device)
    sums, pull = torch.empty_like(lse), torch.empty_like(lse)
    if n:
        c, precision = 1 / temperature, precision_of(z, normalize)
        grid = (triton.cdiv(n, ROWS),)
        _focal_sums_kernel[grid](
            u, paired, lse, n, d, c, M=ROWS, N=COLUMNS, INNER=INNER,
            UNIT=normalize and c <= 40, PRECISION=precision, num_warps=8,
        )  # fmt: skip
        _focal_terms_kernel[grid](
            u, first, last, lse, sums, pull, n, d, c, gamma, M=ROWS, N=NARROW, INNER=INNER,
            FOCUS=_focus_of(gamma), PRECISION=precision, num_warps=8,
        )  # fmt: skip
    shares = _shares(first, last, paired, by_count, all_anchors, reduction)
    loss, unit_grad = -sums * shares, lse.new_empty((0, d))
    if with_gradient:
        unit_grad = _focal_gradient(
            z, u, (order, first, last, paired), lse, pull, shares, temperature, gamma, normalize
        )
    back = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=z.device))
    if reduction == "none":
        return loss[back], lse[back], pull[back], unit_grad
    return loss.sum(dtype=torch.float64).float(), lse[back], pull[back], unit_grad


def _focal_gradient(z, u, groups, lse, pull, w, temperature, gamma, normalize) -> Tensor:
    """sum_i w_i l_i by z (N, d), float32, in the rows' own order; u (N, d), groups as of
    `_ordered`, lse, pull and w (N,): ordered."""
    n, d = z.shape
    order, first, last, paired = groups
    c = 1 / temperature
    is_unit = normalize and c <= 40
    w = c * w
    push = w * pull
    if is_unit:
        push = torch.where(w != 0, push * torch.exp(c - lse), 0)
    grad = torch.empty((n, d), dtype=torch.float32, device=z.device)
    if n and d:
        _focal_gradient_kernel[(triton.cdiv(n, ROWS), triton.cdiv(d, SLICE))](
            u, first, last, paired, lse, w, push, grad, n, d, c, gamma,
            M=ROWS, N=NARROW, INNER=INNER, SLICE=SLICE, FOCUS=_focus_of(gamma), UNIT=is_unit,
            PRECISION=precision_of(z, normalize), num_warps=8,
        )  # fmt: skip
    out = torch.empty_like(grad).index_copy_(0, order, grad)
    return project(out, z.float(), normalize)


def focal_supcon_loss_backward(
    grad_loss: Tensor, z: Tensor, groups: Tensor, lse: Tensor, pull: Tensor, unit_grad: Tensor,
    temperature: float, gamma: float, by_count: bool, all_anchors: bool, normalize: bool,
    reduction: str, with_gradient: bool,
) -> Tensor:  # fmt: skip
    """-> (N, d) in the dtype of z"""
    if with_gradient:
        return (grad_loss * unit_grad).to(z.dtype)
    ordered = order, first, last, paired = _ordered(groups)
    w = grad_loss.float().expand(z.shape[0])[order]
    w = w * _shares(first, last, paired, by_count, all_anchors, reduction)
    return _focal_gradient(
        z, unit(z, normalize)[order], ordered, lse[order], pull[order], w, temperature, gamma,
        normalize,
    ).to(z.dtype)  # fmt: skip


@triton.jit(do_not_specialize=["n"])
def _hard_pair_indices_kernel(
    u_ptr,  # (n, d)
    labels_ptr,  # (n,) int64
    pos_ptr,  # (n,) int64, written
    neg_ptr,  # (n,) int64, written
    n,
    d,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    OFFICIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    live = row < n
    label = tl.load(labels_ptr + row, mask=live, other=0)
    out = 0.0 if OFFICIAL else float("inf")
    best_pos = tl.zeros((M,), tl.float32) + float("inf")
    best_neg = tl.zeros((M,), tl.float32) + float("inf")
    pos = row
    neg = row
    for j in range(0, n, N):
        column = (j + tl.arange(0, N)).to(tl.int64)  # (N,)
        there = column < n
        c = tile(u_ptr, u_ptr, row, column, n, n, d, M, N, INNER, PRECISION)
        c = tl.where(c == c, c, float("inf"))  # NaN is never chosen
        same = label[:, None] == tl.load(labels_ptr + column, mask=there, other=0)[None, :]
        own = row[:, None] == column[None, :]
        if_pos = tl.where(same & (own == 0), c, out)
        if_neg = tl.where(same, out, tl.where(c < float("inf"), -c, float("inf")))
        if_pos = tl.where(there[None, :], if_pos, float("inf"))
        if_neg = tl.where(there[None, :], if_neg, float("inf"))
        least = tl.min(if_pos, 1)
        place = tl.min(tl.where(if_pos == least[:, None], column[None, :], n), 1)
        pos = tl.where(least < best_pos, place, pos)
        best_pos = tl.minimum(best_pos, least)
        least = tl.min(if_neg, 1)
        place = tl.min(tl.where(if_neg == least[:, None], column[None, :], n), 1)
        neg = tl.where(least < best_neg, place, neg)
        best_neg = tl.minimum(best_neg, least)
    if OFFICIAL:
        pos = tl.where(pos == 0, row, pos)
    tl.store(pos_ptr + row, pos, mask=live)
    tl.store(neg_ptr + row, neg, mask=live)


def hard_pair_indices_supports(features: Tensor, *_) -> str | None:
    return too_many_rows(features.shape[0])


def hard_pair_indices_forward(
    features: Tensor, labels: Tensor, official: bool
) -> tuple[Tensor, Tensor]:
    """(B, D), (B,) int64 -> (B,), (B,) int64"""
    n, d = features.shape
    pos = torch.empty((n,), dtype=torch.int64, device=features.device)
    neg = torch.empty_like(pos)
    if n:
        _hard_pair_indices_kernel[(triton.cdiv(n, ROWS // 2),)](
            unit(features, True), labels, pos, neg, n, d, M=ROWS // 2, N=NARROW, INNER=INNER,
            OFFICIAL=official, PRECISION=precision_of(features, True), num_warps=8,
        )  # fmt: skip
    return pos, neg


@triton.jit(do_not_specialize=["b", "classes"])
def _hard_pair_mixup_kernel(
    f_ptr,  # (b, d)
    labels_ptr,  # (b,) int64
    start_ptr,  # (2 b,) int64
    end_ptr,  # (2 b,) int64
    share_ptr,  # (2 b,) float32
    mixed_ptr,  # (3 b, d), written
    soft_ptr,  # (3 b, classes), written
    groups_ptr,  # (3 b,) int64, written
    b,
    d,
    classes,
    neg_clip,
    BLOCK: tl.constexpr,
):
    """A slice of one output row, and (first slice) its soft labels and group."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    made = row - b
    mixture = row >= b
    start = tl.load(start_ptr + made, mask=mixture, other=0)
    start = tl.where(mixture, start, row)
    end = tl.load(end_ptr + made, mask=mixture, other=0)
    end = tl.where(mixture, end, row)
    t = tl.load(share_ptr + made, mask=mixture, other=1.0)
    inside = place < d
    x = tl.load(f_ptr + start * d + place, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(f_ptr + end * d + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(mixture, (1 - t) * x + t * y, x)
    tl.store(mixed_ptr + row * d + place, value.to(mixed_ptr.dtype.element_ty), mask=inside)
    if tl.program_id(1).to(tl.int64) == 0:
        first = tl.load(labels_ptr + start)
        last = tl.load(labels_ptr + end)
        for k in range(0, classes, BLOCK):
            at = k + tl.arange(0, BLOCK)
            part = tl.where(at == first, 1 - t, 0.0) + tl.where(at == last, t, 0.0)
            part = part.to(soft_ptr.dtype.element_ty)
            tl.store(soft_ptr + row * classes + at, part, mask=at < classes)
        wide = tl.cast(classes, tl.int64)
        clipped = mixture & (row < 2 * b) & (t == neg_clip)
        pair = tl.where(clipped, wide * (1 + first) + last, wide * (1 + wide) + made)
        group = tl.where(t == 0, first, tl.where((t == 1) | (first == last), last, pair))
        tl.store(groups_ptr + row, group)


@triton.jit(do_not_specialize=["b"])
def _hard_pair_mixup_adjoint_kernel(
    g_ptr,  # (3 b, d)
    share_ptr,  # (2 b,) float32
    begin_ptr,  # (b + 1,) int64, where a row's list begins
    made_ptr,  # (4 b,) int64: 2 r for a start of mixture r, 2 r + 1 for an end
    grad_ptr,  # (b, d), written
    b,
    d,
    BLOCK: tl.constexpr,
    DETACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = place < d
    total = tl.zeros((BLOCK,), tl.float32)
    if not DETACH:
        total += tl.load(g_ptr + row * d + place, mask=inside, other=0.0).to(tl.float32)
    for entry in range(tl.load(begin_ptr + row), tl.load(begin_ptr + row + 1)):
        made = tl.load(made_ptr + entry)
        t = tl.load(share_ptr + made // 2)
        weight = tl.where(made % 2 == 1, t, 1 - t)
        g = tl.load(g_ptr + (b + made // 2) * d + place, mask=inside, other=0.0)
        total += weight * g.to(tl.float32)
    tl.store(grad_ptr + row * d + place, total.to(grad_ptr.dtype.element_ty), mask=inside)


def _mixtures(perm, lam_neg, lam_pos, hard_pos, hard_neg) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.arange(perm.shape[0], device=perm.device)
    start, end = torch.cat([own, hard_neg]), torch.cat([perm, hard_pos])
    return start, end, torch.cat([lam_neg, lam_pos])


def hard_pair_mixup_forward(
    features: Tensor, labels: Tensor, perm: Tensor, lam_neg: Tensor, lam_pos: Tensor,
    hard_pos: Tensor, hard_neg: Tensor, num_classes: int, neg_clip: float, detach_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(B, D), (B,) -> mixed (3B, D), soft (3B, K), groups (3B,)"""
    b, d = features.shape
    start, end, share = _mixtures(perm, lam_neg, lam_pos, hard_pos, hard_neg)
    mixed = torch.empty((3 * b, d), dtype=features.dtype, device=features.device)
    soft = torch.empty((3 * b, num_classes), dtype=features.dtype, device=features.device)
    groups = torch.empty((3 * b,), dtype=torch.int64, device=features.device)
    if b:
        clip = torch.tensor(neg_clip, dtype=torch.float32).item()  # as the weights are rounded
        _hard_pair_mixup_kernel[(3 * b, max(1, triton.cdiv(d, 512)))](
            features, labels, start, end, share, mixed, soft, groups, b, d, num_classes, clip,
            BLOCK=512, num_warps=4,
        )  # fmt: skip
    return mixed, soft, groups


def hard_pair_mixup_backward(
    grad_mixed: Tensor, perm: Tensor, lam_neg: Tensor, lam_pos: Tensor, hard_pos: Tensor,
    hard_neg: Tensor, detach_first: bool,
) -> Tensor:  # fmt: skip
    """(3B, D) -> (B, D)"""
    b, d = perm.shape[0], grad_mixed.shape[1]
    start, end, share = _mixtures(perm, lam_neg, lam_pos, hard_pos, hard_neg)
    target, made = torch.stack([start, end], 1).reshape(-1).sort(stable=True)
    begin = torch.searchsorted(target, torch.arange(b + 1, device=perm.device))
    grad = torch.empty((b, d), dtype=grad_mixed.dtype, device=perm.device)
    if b and d:
        _hard_pair_mixup_adjoint_kernel[(b, triton.cdiv(d, 512))](
            grad_mixed, share, begin, made, grad, b, d, BLOCK=512, DETACH=detach_first, num_warps=4
        )
    return grad
