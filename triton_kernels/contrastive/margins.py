"""Triton kernels of `tcm_loss` and `opis`.

tcm_loss   forward: sums and counts per block of rows; without references only tiles on and
           above the diagonal, those above counted twice. Backward: masks of +1 in two products,
           exact in any precision, each scaled by its constant at the end.
opis       rows ordered by class; tiles on and above the diagonal go into histograms by integer
           atomics: digits of the ordered cosines (the range, two sweeps of 16 bits each), then
           classes by intervals of the grid. Sums of integers have no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dashpot.triton_kernels.contrastive.tiles import (
    INNER,
    NARROW,
    ROWS,
    add_product,
    precision_of,
    project,
    tile,
    too_many_rows,
    unit,
)
from torch import Tensor

_DIGIT = 16  # bits of a cosine's representation that a sweep decides


@triton.jit
def _sets(s, same, own, there, margin_pos, margin_neg):
    """Which pairs are in S+ and S-; NaN is in both, so that it shows."""
    counted = there & (own == 0)
    pos = same & counted & ((s > margin_pos) == 0)
    neg = (same == 0) & counted & ((s < margin_neg) == 0)
    return pos, neg


@triton.jit(do_not_specialize=["b", "n", "shift"])
def _tcm_sums_kernel(
    u_ptr,  # (b, d)
    v_ptr,  # (n, d)
    labels_ptr,  # (b,) int64
    ref_labels_ptr,  # (n,) int64
    sums_ptr,  # (2, programs) float64, written
    counts_ptr,  # (2, programs) int64, written
    b,
    n,
    d,
    shift,  # row i and column i + shift are one row, if OWN
    margin_pos,
    margin_neg,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    OWN: tl.constexpr,
    MIRROR: tl.constexpr,  # columns are the rows: tiles above the diagonal count twice
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program * M + tl.arange(0, M)  # (M,)
    label = tl.load(labels_ptr + row, mask=row < b, other=0)
    sum_pos = tl.zeros((M,), tl.float64)
    sum_neg = tl.zeros((M,), tl.float64)
    count_pos = tl.zeros((M,), tl.int64)
    count_neg = tl.zeros((M,), tl.int64)
    begin = program * M if MIRROR else program * 0
    for j in range(begin, n, N):
        column = j + tl.arange(0, N).to(tl.int64)  # (N,)
        s = tile(u_ptr, v_ptr, row, column, b, n, d, M, N, INNER, PRECISION)
        code = tl.load(ref_labels_ptr + column, mask=column < n, other=0)
        own = (row[:, None] + shift == column[None, :]) & OWN
        there = (row < b)[:, None] & (column < n)[None, :]
        pos, neg = _sets(s, label[:, None] == code[None, :], own, there, margin_pos, margin_neg)
        times = tl.where(j < begin + M, 1, 2) if MIRROR else 1
        sum_pos += times * tl.sum(tl.where(pos, margin_pos - s, 0.0), 1).to(tl.float64)
        sum_neg += times * tl.sum(tl.where(neg, s - margin_neg, 0.0), 1).to(tl.float64)
        count_pos += times * tl.sum(pos.to(tl.int32), 1).to(tl.int64)
        count_neg += times * tl.sum(neg.to(tl.int32), 1).to(tl.int64)
    programs = tl.num_programs(0)
    tl.store(sums_ptr + program, tl.sum(sum_pos, 0))
    tl.store(sums_ptr + programs + program, tl.sum(sum_neg, 0))
    tl.store(counts_ptr + program, tl.sum(count_pos, 0))
    tl.store(counts_ptr + programs + program, tl.sum(count_neg, 0))


@triton.jit(do_not_specialize=["b", "n", "shift"])
def _tcm_gradient_kernel(
    u_ptr,  # (b, d)
    v_ptr,  # (n, d)
    labels_ptr,  # (b,) int64
    ref_labels_ptr,  # (n,) int64
    scale_ptr,  # (2,) float32: the weight of a pair in S+, and in S-
    grad_ptr,  # (b, d) float32, written: G v
    b,
    n,
    d,
    shift,
    margin_pos,
    margin_neg,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    SLICE: tl.constexpr,
    OWN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)  # (M,)
    place = tl.program_id(1).to(tl.int64) * SLICE + tl.arange(0, SLICE)  # (SLICE,)
    label = tl.load(labels_ptr + row, mask=row < b, other=0)
    of_pos = tl.zeros((M, SLICE), tl.float32)
    of_neg = tl.zeros((M, SLICE), tl.float32)
    for j in range(0, n, N):
        column = (j + tl.arange(0, N)).to(tl.int64)  # (N,)
        s = tile(u_ptr, v_ptr, row, column, b, n, d, M, N, INNER, PRECISION)
        code = tl.load(ref_labels_ptr + column, mask=column < n, other=0)
        own = (row[:, None] + shift == column[None, :]) & OWN
        there = (row < b)[:, None] & (column < n)[None, :]
        pos, neg = _sets(s, label[:, None] == code[None, :], own, there, margin_pos, margin_neg)
        of_pos = add_product(of_pos, pos.to(tl.float32), v_ptr, column, place, n, d, PRECISION)
        of_neg = add_product(of_neg, neg.to(tl.float32), v_ptr, column, place, n, d, PRECISION)
    grad = tl.load(scale_ptr) * of_pos + tl.load(scale_ptr + 1) * of_neg
    at = grad_ptr + row[:, None] * d + place[None, :]
    tl.store(at, grad, mask=(row < b)[:, None] & (place < d)[None, :])


def tcm_loss_supports(embeddings: Tensor, labels: Tensor, ref: Tensor | None, *_) -> str | None:
    return too_many_rows(embeddings.shape[0] + (0 if ref is None else ref.shape[0]))


def tcm_loss_forward(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None,
    offset: int, margin_pos: float, margin_neg: float, weight_pos: float, weight_neg: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(B, D), (B,) [, (N, D), (N,)] -> loss () float32, counts (2,) int64, sums (2,) float32"""
    b, d = embeddings.shape
    mirror = ref_embeddings is None
    u = unit(embeddings, normalize)
    v = u if mirror else unit(ref_embeddings, normalize)
    programs = triton.cdiv(b, ROWS)
    sums = torch.empty((2, programs), dtype=torch.float64, device=u.device)
    counts = torch.empty((2, programs), dtype=torch.int64, device=u.device)
    if b:
        _tcm_sums_kernel[(programs,)](
            u, v, labels, labels if mirror else ref_labels, sums, counts, b, v.shape[0], d,
            max(offset, 0), margin_pos, margin_neg, M=ROWS, N=NARROW, INNER=INNER,
            OWN=offset >= 0, MIRROR=mirror, PRECISION=precision_of(embeddings, normalize),
            num_warps=8,
        )  # fmt: skip
    sums, counts = sums.sum(1), counts.sum(1)
    means = sums / counts.clamp(min=1)
    loss = weight_pos * means[0] + weight_neg * means[1]
    return loss.float(), counts, sums.float()


def tcm_loss_backward(
    grad_loss: Tensor, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None,
    ref_labels: Tensor | None, counts: Tensor, offset: int, margin_pos: float, margin_neg: float,
    weight_pos: float, weight_neg: float, normalize: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """-> gradients (B, D) and, with references, (N, D)"""
    mirror = ref_embeddings is None
    u = unit(embeddings, normalize)
    v = u if mirror else unit(ref_embeddings, normalize)
    ids = labels if mirror else ref_labels
    share = grad_loss.float() / counts.clamp(min=1)
    scale = torch.stack([-weight_pos * share[0], weight_neg * share[1]]) * (2 if mirror else 1)

    def weighted(a, b, a_labels, b_labels, shift, rows):
        grad = torch.empty(a.shape, dtype=torch.float32, device=a.device)
        n, d = a.shape
        if n and d:
            _tcm_gradient_kernel[(triton.cdiv(n, ROWS // 2), triton.cdiv(d, NARROW))](
                a, b, a_labels, b_labels, scale, grad, n, b.shape[0], d, shift, margin_pos,
                margin_neg, M=ROWS // 2, N=NARROW, INNER=INNER, SLICE=NARROW, OWN=offset >= 0,
                PRECISION=precision_of(embeddings, normalize), num_warps=8,
            )  # fmt: skip
        return project(grad, rows, normalize)

    shift = max(offset, 0)
    grad = weighted(u, v, labels, ids, shift, embeddings) if needs_grad[0] else None
    if mirror or not needs_grad[2]:
        return grad, None
    return grad, weighted(v, u, ids, labels, -shift, ref_embeddings)


@triton.jit(do_not_specialize=["n", "num_classes"])
def _opis_digits_kernel(
    u_ptr,  # (n, d)
    classes_ptr,  # (n,) int64
    found_ptr,  # (2,) int64, the leading bits of both ranks' keys
    counts_ptr,  # (2, 65536) int64, added to
    n,
    d,
    num_classes,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    LEADING: tl.constexpr,  # the first sweep
    PRECISION: tl.constexpr,
):
    """How many impostor cosines have each value of the next 16 bits; keys grow as cosines fall."""
    first_row = tl.program_id(0).to(tl.int64) * M
    row = first_row + tl.arange(0, M)  # (M,)
    own = tl.load(classes_ptr + row, mask=row < n, other=0)
    low = tl.load(found_ptr)
    high = tl.load(found_ptr + 1)
    for j in range(first_row, n, N):
        column = j + tl.arange(0, N).to(tl.int64)  # (N,)
        s = tile(u_ptr, u_ptr, row, column, n, n, d, M, N, INNER, PRECISION)
        its = tl.load(classes_ptr + column, mask=column < n, other=0)
        pair = (row[:, None] < column[None, :]) & (column < n)[None, :]
        alike = (own[:, None] == its[None, :]) & (own < num_classes)[:, None]
        pair = pair & (alike == 0)
        bits = (s + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        key = tl.where(bits >= 0x80000000, bits, 0x7FFFFFFF - bits)
        if LEADING:
            tl.atomic_add(counts_ptr + (key >> 16), tl.full((M, N), 1, tl.int64), mask=pair)
        else:
            digit = key & 0xFFFF
            one = tl.full((M, N), 1, tl.int64)
            tl.atomic_add(counts_ptr + digit, one, mask=pair & ((key >> 16) == low))
            tl.atomic_add(counts_ptr + 65536 + digit, one, mask=pair & ((key >> 16) == high))


@triton.jit(do_not_specialize=["n", "num_classes", "thresholds"])
def _opis_counts_kernel(
    u_ptr,  # (n, d)
    classes_ptr,  # (n,) int64
    bounds_ptr,  # (thresholds,) float32, descending cosines
    genuine_ptr,  # (num_classes, thresholds + 1) int64, added to
    impostor_ptr,  # (num_classes, thresholds + 1) int64, added to
    n,
    d,
    num_classes,
    thresholds,
    M: tl.constexpr,
    N: tl.constexpr,
    INNER: tl.constexpr,
    STEPS: tl.constexpr,  # of a binary search among the thresholds
    PRECISION: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * M
    row = first_row + tl.arange(0, M)  # (M,)
    own = tl.load(classes_ptr + row, mask=row < n, other=0)
    width = (thresholds + 1).to(tl.int64)
    for j in range(first_row, n, N):
        column = j + tl.arange(0, N).to(tl.int64)  # (N,)
        s = tile(u_ptr, u_ptr, row, column, n, n, d, M, N, INNER, PRECISION)
        its = tl.load(classes_ptr + column, mask=column < n, other=0)
        pair = (row[:, None] < column[None, :]) & (column < n)[None, :]
        alike = (own[:, None] == its[None, :]) & (own < num_classes)[:, None]
        below = tl.zeros((M, N), tl.int32)  # thresholds that are nearer than the pair
        above = tl.zeros((M, N), tl.int32) + thresholds
        for _ in range(STEPS):
            middle = (below + above) // 2
            bound = tl.load(bounds_ptr + middle, mask=middle < thresholds, other=float("-inf"))
            nearer = (s < bound) & (below < above)
            below = tl.where(nearer, middle + 1, below)
            above = tl.where(nearer, above, tl.minimum(above, middle))
        one = tl.full((M, N), 1, tl.int64)
        of_row = own[:, None] * width + below
        of_column = its[None, :] * width + below
        row_live = (own < num_classes)[:, None]
        column_live = (its < num_classes)[None, :]
        stranger = pair & (alike == 0)
        tl.atomic_add(genuine_ptr + of_row, one, mask=pair & alike)
        tl.atomic_add(impostor_ptr + of_row, one, mask=stranger & row_live)
        tl.atomic_add(impostor_ptr + of_column, one, mask=stranger & column_live)


def opis_supports(embeddings: Tensor, *_) -> str | None:
    return too_many_rows(embeddings.shape[0])


def _range_of(u, classes, num_classes: int, ranks: list[int], precision: str) -> Tensor:
    """The impostor cosines (2,) float64 of two ranks, counted from 1 by falling cosine; exact."""
    n, d = u.shape
    left = torch.tensor(ranks, device=u.device)  # (2,)
    found = torch.zeros(2, dtype=torch.int64, device=u.device)
    for leading in (True, False):
        counts = torch.zeros((2, 1 << _DIGIT), dtype=torch.int64, device=u.device)
        _opis_digits_kernel[(triton.cdiv(n, ROWS),)](
            u, classes, found, counts, n, d, num_classes, M=ROWS, N=NARROW, INNER=INNER,
            LEADING=leading, PRECISION=precision, num_warps=8,
        )  # fmt: skip
        upto = (counts[:1].expand(2, -1) if leading else counts).cumsum(1)  # (2, 65536)
        digit = (upto < left[:, None]).sum(1)  # (2,)
        before = upto.gather(1, (digit - 1).clamp(min=0)[:, None])[:, 0]
        left = left - torch.where(digit > 0, before, 0)
        found = (found << _DIGIT) + digit
    bits = torch.where(found >= 1 << 31, found - (1 << 32), (1 << 31) - 1 - found)
    return bits.to(torch.int32).view(torch.float32).double()


def opis_forward(
    embeddings: Tensor, classes: Tensor, num_classes: int, d_range: list[float],
    ranks: list[int], num_thresholds: int, euclidean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(N, D), (N,) -> genuine, impostor (C, T) int64, grid (T,) float64"""
    from dashpot.contrastive.opis import distance_of, grid_of

    n, d = embeddings.shape
    precision = precision_of(embeddings, True)
    classes, order = classes.sort(stable=True)
    u = unit(embeddings, True)[order].contiguous()
    exact = None
    if d_range:
        ends = torch.tensor(d_range, dtype=torch.float64, device=u.device)
    else:
        exact = _range_of(u, classes, num_classes, ranks, precision)
        ends = distance_of(exact, euclidean)
    grid, cosines = grid_of(ends, num_thresholds, euclidean, exact)
    # The least float32 that is not below each threshold: comparing with it is exact.
    bounds = cosines.float()
    up = torch.nextafter(bounds, torch.full_like(bounds, torch.inf))
    bounds = torch.where(bounds.double() < cosines, up, bounds)
    tables = torch.zeros((2, num_classes, num_thresholds + 1), dtype=torch.int64, device=u.device)
    if n:
        _opis_counts_kernel[(triton.cdiv(n, ROWS),)](
            u, classes, bounds, tables[0], tables[1], n, d, num_classes, num_thresholds,
            M=ROWS, N=NARROW, INNER=INNER, STEPS=(num_thresholds + 1).bit_length(),
            PRECISION=precision, num_warps=8,
        )  # fmt: skip
    upto = tables[..., :-1].cumsum(2)
    return upto[0].contiguous(), upto[1].contiguous(), grid
