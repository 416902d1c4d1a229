"""Triton kernels of the losses on rows of logits; the search for neighbours is in the sweep.

    rows     1 / max(|z|, eps) of each row. float32 rows are also written normalised: their products
             must not leave float32's range. 16-bit rows stay as they are: a product of two of them
             is exact, so cosines come from z_i.z_j times both inverse norms, and lose nothing to a
             rounding of u.
    sweep    a program owns BLOCK_M rows and a part of the keys, and passes over them in tiles: sums
             of exponentials (relative to 1 / temperature where |cos| <= 1 allows it, else to a
             running maximum) and the nearest key. The parts are merged by the kernel `merge`, so
             that small batches occupy more than a few multiprocessors.
    weigh    the backward: the tile again, W_ij = g_i (keep e^{s - lse_i} - [j = pos i]) and its
             like by columns, and a second product W y_j. One tile serves both terms; no atomics.
    project  adds the parts, and goes back through the normalisation; c u.g of each row is the
             gradient of the scale.

Statistics are float32; products of float32 rows take three TF32 products if torch's float32 matmul
precision is "highest", one otherwise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dashpot.contrastive._pairs import project as project_back
from dashpot.contrastive._pairs import unit_rows, wide
from dashpot.triton_kernels.contrastive.pairs import (
    DEPTH,
    FIXED,
    INTERPRETED,
    KEYS,
    ROWS,
    WIDTH,
    block_of,
    cosines,
    kept,
    local_of,
    parts_of,
    precision_of,
)  # fmt: skip
from torch import Tensor

_EPS = 1e-12


@triton.jit
def _rows_kernel(z_ptr, u_ptr, inverse_ptr, d, eps, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """z (n, d) -> inverse (n,), u (n, d) if WRITE."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(z_ptr + row * d + at, mask=at < d, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(most, 0)
    # Squares of x / largest: none leaves float32's range.
    safe = tl.where(largest > 0, largest, 1.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        at = k + tl.arange(0, BLOCK)
        x = tl.load(z_ptr + row * d + at, mask=at < d, other=0.0).to(tl.float32) / safe
        total += x * x
    norm = safe * tl.sqrt(tl.sum(total, 0))
    norm = tl.where(norm < eps, eps, norm)
    tl.store(inverse_ptr + row, 1.0 / norm)
    if WRITE:
        for k in range(0, d, BLOCK):
            at = k + tl.arange(0, BLOCK)
            x = tl.load(z_ptr + row * d + at, mask=at < d, other=0.0).to(tl.float32)
            tl.store(u_ptr + row * d + at, x / norm, mask=at < d)


@triton.jit
def _sweep_kernel(
    x_ptr, y_ptr,  # rows (m, d), keys (n, d)
    x_inverse_ptr, y_inverse_ptr,  # (m,), (n,), read if RAW
    row_code_ptr, key_code_ptr, positive_ptr,  # (m,), (n,), (m,) int64, read if VIEWS
    scale_ptr,  # (1,) float32, read if SCALE
    most_ptr, sum_ptr,  # (parts, m) float32, if LOGITS
    best_ptr, nearest_ptr,  # (parts, m) float32, int64, if NEAREST
    last_ptr, last_key_ptr,  # (m,) float32, int64, read if AFTER: the neighbour before this one
    m, n, d, chunk, offset, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr,
    RAW: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    SCALE: tl.constexpr, FIXED: tl.constexpr,
    VIEWS: tl.constexpr, WITHIN: tl.constexpr, ACROSS: tl.constexpr,
    LOGITS: tl.constexpr, NEAREST: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """chunk: keys of a part. offset: key offset + i is row i itself (for NEAREST)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1).to(tl.int64)
    c = factor
    if SCALE:
        c = tl.load(scale_ptr)
    row_code = i
    positive = i
    if VIEWS:
        row_code = tl.load(row_code_ptr + i, mask=i < m, other=0)
        positive = tl.load(positive_ptr + i, mask=i < m, other=-1)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    if FIXED:
        most = tl.zeros((BLOCK_M,), tl.float32) + c
    total = tl.zeros((BLOCK_M,), tl.float32)
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    nearest = tl.full((BLOCK_M,), -1, tl.int64)
    local = tl.arange(0, BLOCK_N)
    begin = part * chunk
    end = tl.minimum(begin + chunk, n)
    for start in range(begin, end, BLOCK_N):
        j = start + local.to(tl.int64)
        cosine = cosines(
            x_ptr,
            y_ptr,
            i,
            j,
            m,
            n,
            d,
            x_inverse_ptr,
            y_inverse_ptr,
            BLOCK_M,
            BLOCK_N,
            DEPTH,
            RAW,
            PRECISION,
            WIDEN,
        )
        if LOGITS:
            key_code = j
            if VIEWS:
                key_code = tl.load(key_code_ptr + j, mask=j < n, other=0)
            keep = kept(
                i, j, m, n, row_code, key_code, local_of(positive, start, BLOCK_N), local,
                VIEWS, WITHIN, ACROSS,
            )  # fmt: skip
            s = tl.where(keep, cosine * c, -float("inf"))
            if not FIXED:
                new = tl.maximum(most, tl.max(s, 1))
                total *= tl.where(new > most, tl.exp(most - new), 1.0)
                most = new
            total += tl.sum(tl.where(keep, tl.exp(s - most[:, None]), 0.0), 1)
        if NEAREST:
            itself = local_of(i + offset, start, BLOCK_N)
            near = (j < n)[None, :] & (itself[:, None] != local[None, :])
            if VIEWS:
                near = near & ((i >= m // 2)[:, None] == (j >= n // 2)[None, :])
            if AFTER:
                last = tl.load(last_ptr + i, mask=i < m, other=0.0)[:, None]
                last_key = tl.load(last_key_ptr + i, mask=i < m, other=0)
                beyond = local_of(last_key, start, BLOCK_N)[:, None] < local[None, :]
                near = near & ((cosine < last) | ((cosine == last) & beyond))
            value = tl.where(near, cosine, -float("inf"))
            here = tl.max(value, 1)
            equal = near & (value == here[:, None])
            first = start + tl.min(tl.where(equal, local[None, :], BLOCK_N), 1).to(tl.int64)
            nearest = tl.where(here > best, first, nearest)
            best = tl.where(here > best, here, best)
    at = part * m + i
    if LOGITS:
        tl.store(most_ptr + at, most, mask=i < m)
        tl.store(sum_ptr + at, total, mask=i < m)
    if NEAREST:
        tl.store(best_ptr + at, best, mask=i < m)
        tl.store(nearest_ptr + at, nearest, mask=i < m)


@triton.jit
def _merge_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr, positive_ptr, scale_ptr,
    most_ptr, sum_ptr,  # (parts, m)
    lse_ptr, logit_ptr,  # (m,)
    m, n, d, parts, factor,
    BLOCK_M: tl.constexpr, DEPTH: tl.constexpr, RAW: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """The parts' sums into lse, in their order; the logits of the positives, 0 without one."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = i < m
    c = factor
    if SCALE:
        c = tl.load(scale_ptr)
    most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for part in range(parts):
        found = tl.load(most_ptr + tl.cast(part, tl.int64) * m + i, mask=live, other=0.0)
        most = tl.maximum(most, found)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * m + i
        found = tl.load(most_ptr + at, mask=live, other=0.0)
        share = tl.load(sum_ptr + at, mask=live, other=0.0)
        total += tl.where(found == most, share, share * tl.exp(found - most))
    tl.store(lse_ptr + i, most + tl.log(total), mask=live)
    positive = tl.load(positive_ptr + i, mask=live, other=-1)
    there = live & (positive >= 0) & (positive < n)
    logit = tl.zeros((BLOCK_M,), tl.float32)
    for k in range(0, d, DEPTH):
        at = k + tl.arange(0, DEPTH)
        inside = there[:, None] & (at < d)[None, :]
        x = tl.load(x_ptr + i[:, None] * d + at[None, :], mask=inside, other=0.0)
        y = tl.load(y_ptr + positive[:, None] * d + at[None, :], mask=inside, other=0.0)
        logit += tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    if RAW:
        logit *= tl.load(x_inverse_ptr + i, mask=there, other=0.0)
        logit *= tl.load(y_inverse_ptr + positive, mask=there, other=0.0)
    tl.store(logit_ptr + i, logit * c, mask=live)


@triton.jit
def _weigh_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr,
    row_code_ptr, key_code_ptr,  # (m,), (n,) int64, read if VIEWS
    row_positive_ptr, key_positive_ptr,  # (m,), (n,) int64
    row_weight_ptr, row_lse_ptr, key_weight_ptr, key_lse_ptr,  # (m,), (n,) float32
    scale_ptr,
    grad_ptr,  # (parts, m, d) float32, before the factor c
    m, n, d, chunk, factor,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    RAW: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, SCALE: tl.constexpr,
    VIEWS: tl.constexpr, WITHIN: tl.constexpr, ACROSS: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """OWN: the rows have losses; OTHER: the keys have."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    i = first_row + tl.arange(0, BLOCK_M)
    part = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    c = factor
    if SCALE:
        c = tl.load(scale_ptr)
    row_code = i
    if VIEWS:
        row_code = tl.load(row_code_ptr + i, mask=i < m, other=0)
    row_positive = tl.load(row_positive_ptr + i, mask=i < m, other=-1)
    own = tl.load(row_weight_ptr + i, mask=i < m, other=0.0) if OWN else i.to(tl.float32)
    own_lse = tl.load(row_lse_ptr + i, mask=i < m, other=0.0) if OWN else i.to(tl.float32)
    grad = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    local = tl.arange(0, BLOCK_N)
    begin = part * chunk
    end = tl.minimum(begin + chunk, n)
    for start in range(begin, end, BLOCK_N):
        j = start + local.to(tl.int64)
        s = c * cosines(
            x_ptr,
            y_ptr,
            i,
            j,
            m,
            n,
            d,
            x_inverse_ptr,
            y_inverse_ptr,
            BLOCK_M,
            BLOCK_N,
            DEPTH,
            RAW,
            PRECISION,
            WIDEN,
        )
        key_code = j
        if VIEWS:
            key_code = tl.load(key_code_ptr + j, mask=j < n, other=0)
        chosen = local_of(row_positive, start, BLOCK_N)
        keep = kept(i, j, m, n, row_code, key_code, chosen, local, VIEWS, WITHIN, ACROSS)
        weight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if OWN:
            share = tl.where(keep, tl.exp(s - own_lse[:, None]), 0.0)
            share -= tl.where(chosen[:, None] == local[None, :], 1.0, 0.0)
            weight += own[:, None] * share
        if OTHER:
            other = tl.load(key_weight_ptr + j, mask=j < n, other=0.0)
            other_lse = tl.load(key_lse_ptr + j, mask=j < n, other=0.0)
            key_positive = tl.load(key_positive_ptr + j, mask=j < n, other=-1)
            share = tl.where(keep, tl.exp(s - other_lse[None, :]), 0.0)
            place = local_of(key_positive, first_row, BLOCK_M)
            share -= tl.where(place[None, :] == tl.arange(0, BLOCK_M)[:, None], 1.0, 0.0)
            weight += other[None, :] * share
        weight = tl.where((i < m)[:, None] & (j < n)[None, :], weight, 0.0)
        y = tl.load(
            y_ptr + j[:, None] * d + column[None, :],
            mask=(j < n)[:, None] & (column < d)[None, :],
            other=0.0,
        )
        if RAW:
            weight *= tl.load(y_inverse_ptr + j, mask=j < n, other=0.0)[None, :]
        if y.dtype == tl.bfloat16:
            rounded = weight.to(tl.bfloat16)
            if WIDEN:
                grad = tl.dot(rounded.to(tl.float32), y.to(tl.float32), grad)
            else:
                grad = tl.dot(rounded, y, grad)
        else:  # float16 is exact in TF32, the weights are not in float16's range
            grad = tl.dot(weight, y.to(tl.float32), grad, input_precision=PRECISION)
    at = (part * m + i)[:, None] * d + column[None, :]
    tl.store(grad_ptr + at, grad, mask=(i < m)[:, None] & (column < d)[None, :])


@triton.jit
def _project_kernel(
    x_ptr, x_inverse_ptr, norm_inverse_ptr, scale_ptr,
    grad_ptr,  # (parts, m, d) float32
    out_ptr,  # (m, d)
    along_ptr,  # (m,) float32: u.g before the factor c
    m, d, parts, factor, ceiling,  # ceiling: 1 / eps, what rows shorter than eps are divided by
    BLOCK: tl.constexpr, RAW: tl.constexpr, SCALE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = factor
    if SCALE:
        c = tl.load(scale_ptr)
    inverse = tl.load(norm_inverse_ptr + row)
    own = tl.load(x_inverse_ptr + row) if RAW else 1.0
    along = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, d, BLOCK):
        at = k + tl.arange(0, BLOCK)
        g = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            base = (tl.cast(part, tl.int64) * m + row) * d
            g += tl.load(grad_ptr + base + at, mask=at < d, other=0.0)
        along += g * tl.load(x_ptr + row * d + at, mask=at < d, other=0.0).to(tl.float32) * own
    total = tl.sum(along, 0)
    tl.store(along_ptr + row, total)
    back = tl.where(inverse < ceiling, total, 0.0) if NORMALIZE else total * 0.0
    for k in range(0, d, BLOCK):
        at = k + tl.arange(0, BLOCK)
        g = tl.zeros((BLOCK,), tl.float32)
        for part in range(parts):
            base = (tl.cast(part, tl.int64) * m + row) * d
            g += tl.load(grad_ptr + base + at, mask=at < d, other=0.0)
        u = tl.load(x_ptr + row * d + at, mask=at < d, other=0.0).to(tl.float32) * own
        result = (g - u * back) * inverse * c
        tl.store(out_ptr + row * d + at, result.to(out_ptr.dtype.element_ty), mask=at < d)


class Rows:
    """Rows (n, d) as the kernels take them."""

    def __init__(self, z: Tensor, normalize: bool, eps: float = _EPS):
        self.n, self.d = z.shape
        self.z, self.normalize, self.eps = z, normalize, eps
        self.raw = normalize and z.dtype != torch.float32
        self.x = torch.empty_like(z) if normalize and not self.raw else z
        self.inverse = torch.ones(self.n, dtype=torch.float32, device=z.device)
        if normalize and self.n:
            self.inverse = torch.empty(self.n, dtype=torch.float32, device=z.device)
            _rows_kernel[(self.n,)](z, self.x, self.inverse, self.d, eps, WRITE=not self.raw,
                                    BLOCK=block_of(self.d), num_warps=1)  # fmt: skip


def project_rows(rows, grad, out_dtype, factor=1.0, scale=None):
    """c times the sum of the parts of dL/du (parts, m, d), back to the rows (m, d); u.g (m,)."""
    parts, m, d = grad.shape
    out = torch.zeros((m, d), dtype=out_dtype, device=grad.device)
    along = torch.zeros(m, dtype=torch.float32, device=grad.device)
    if m and d:
        _project_kernel[(m,)](
            rows.x, rows.inverse, rows.inverse, rows.inverse if scale is None else scale, grad,
            out, along, m, d, parts, factor, 1 / rows.eps, BLOCK=block_of(d), RAW=rows.raw,
            SCALE=scale is not None, NORMALIZE=rows.normalize, num_warps=1,
        )  # fmt: skip
    return out, along


class Pairs:
    """Rows against keys, the factor c, and which pairs count."""

    def __init__(self, rows, keys, factor=1.0, scale=None, codes=None, within=True, across=False):
        self.rows, self.keys, self.factor = rows, keys, factor
        self.scale = None if scale is None else scale.detach().float().reshape(1)
        self.codes, self.within, self.across = codes, within, across
        normal = rows.normalize and keys.normalize
        self.fixed = scale is None and normal and 1 / factor >= FIXED

    def options(self) -> dict:
        return {
            "WIDEN": INTERPRETED, "RAW": self.rows.raw,
            "PRECISION": precision_of(self.rows.x.dtype), "SCALE": self.scale is not None,
            "VIEWS": self.codes is not None, "WITHIN": self.within, "ACROSS": self.across,
            "BLOCK_M": ROWS, "BLOCK_N": KEYS // 2 if self.rows.x.dtype == torch.float32 else KEYS,
            "num_warps": 8,
        }  # fmt: skip

    def depth(self) -> int:
        """Of the products beside a gradient's accumulators: float32 rows are split into two parts
        each, which half the depth keeps in registers."""
        return DEPTH // 2 if self.rows.x.dtype == torch.float32 else DEPTH

    def _some(self, value):
        """What is passed for a pointer that the kernel does not read."""
        return self.rows.inverse if value is None else value

    def sweep(self, positive, nearest=False):
        """(lse (m,), logit of the positive (m,), nearest (m,))."""
        lse, logit, (_, near) = self._sweep(positive, True, nearest, 0, None)
        return lse, logit, near

    def nearest(self, offset, last):
        """(cosine (m,), key (m,)) of each row's first neighbour after `last`, of the same form."""
        return self._sweep(None, False, True, offset, last)[2]

    def _sweep(self, positive, logits, nearest, offset, last):
        rows, keys = self.rows, self.keys
        m, n, d, device = rows.n, keys.n, rows.d, rows.x.device
        lse = torch.full((m,), -torch.inf, dtype=torch.float32, device=device)
        logit, near = torch.zeros_like(lse), torch.full((m,), -1, device=device)
        if m == 0 or n == 0:
            return lse, logit, (lse, near)
        parts, chunk = parts_of(m, n)
        most, total, best = (
            torch.empty((parts, m), dtype=torch.float32, device=device) for _ in range(3)
        )
        found = torch.empty((parts, m), dtype=torch.int64, device=device)
        codes, before = self.codes or (None, None), last or (None, None)
        _sweep_kernel[(triton.cdiv(m, ROWS), parts)](
            rows.x, keys.x, rows.inverse, keys.inverse, self._some(codes[0]), self._some(codes[1]),
            self._some(positive), self._some(self.scale), most, total, best, found,
            self._some(before[0]), self._some(before[1]), m, n, d, chunk, offset, self.factor,
            FIXED=self.fixed, LOGITS=logits, NEAREST=nearest, AFTER=last is not None, DEPTH=DEPTH,
            **self.options(),
        )  # fmt: skip
        value = lse
        if nearest:
            # The first of equals; a row that is not a number has none, and shows it by itself.
            value, part = best.max(0)
            near = found.gather(0, part[None])[0].clamp(0, n - 1)
        if logits:
            _merge_kernel[(triton.cdiv(m, ROWS),)](
                rows.x, keys.x, rows.inverse, keys.inverse, positive, self._some(self.scale), most,
                total, lse, logit, m, n, d, parts, self.factor,
                BLOCK_M=ROWS, DEPTH=DEPTH, RAW=rows.raw, SCALE=self.scale is not None,
                num_warps=4,
            )  # fmt: skip
        return lse, logit, (value, near)

    def gradient(self, own, other, out_dtype):
        """Of the rows: (grad (m, d), u.g (m,)). own, other: (g, lse, positive) of rows and keys."""
        rows, keys = self.rows, self.keys
        m, n, d, device = rows.n, keys.n, rows.d, rows.x.device
        if m == 0 or n == 0 or d == 0:
            along = torch.zeros(m, dtype=torch.float32, device=device)
            return torch.zeros((m, d), dtype=out_dtype, device=device), along
        parts, chunk = parts_of(m, n)
        grad = torch.empty((parts, m, d), dtype=torch.float32, device=device)
        codes = self.codes or (None, None)
        mine, theirs = own or (None, None, None), other or (None, None, None)
        nobody = torch.full((max(m, n),), -1, device=device)
        _weigh_kernel[(triton.cdiv(m, ROWS), parts, triton.cdiv(d, WIDTH))](
            rows.x, keys.x, rows.inverse, keys.inverse, self._some(codes[0]), self._some(codes[1]),
            nobody if mine[2] is None else mine[2], nobody if theirs[2] is None else theirs[2],
            self._some(mine[0]), self._some(mine[1]), self._some(theirs[0]), self._some(theirs[1]),
            self._some(self.scale), grad, m, n, d, chunk, self.factor,
            WIDTH=WIDTH, OWN=own is not None, OTHER=other is not None, DEPTH=self.depth(),
            **self.options(),
        )  # fmt: skip
        return project_rows(rows, grad, out_dtype, self.factor, self.scale)


def info_nce_forward(query, key, positives, logit_scale, temperature, symmetric, normalize):
    """(loss (B,), lse (B,), lse of the keys (N,) if symmetric)."""
    rows, keys = Rows(query, normalize), Rows(key, normalize)
    positive = positives if positives is not None else torch.arange(len(query), device=query.device)
    lse, logit, _ = Pairs(rows, keys, 1 / temperature, logit_scale).sweep(positive)
    if not symmetric:
        return lse - logit, lse, lse[:0].clone()
    lse_key, _, _ = Pairs(keys, rows, 1 / temperature, logit_scale).sweep(positive)
    return 0.5 * (lse + lse_key) - logit, lse, lse_key


def info_nce_backward(
    grad_loss, query, key, positives, logit_scale, lse, lse_key, temperature, symmetric, normalize,
    needs_grad,
):  # fmt: skip
    rows, keys = Rows(query, normalize), Rows(key, normalize)
    positive = positives if positives is not None else torch.arange(len(query), device=query.device)
    weight = 0.5 * grad_loss if symmetric else grad_loss
    by_rows = (weight, lse, positive)
    by_keys = (weight, lse_key, positive) if symmetric else None
    grad_query = grad_key = grad_scale = None
    if needs_grad[0] or needs_grad[3]:
        pairs = Pairs(rows, keys, 1 / temperature, logit_scale)
        grad_query, along = pairs.gradient(by_rows, by_keys, query.dtype)
        if needs_grad[3]:
            grad_scale = along.sum().to(logit_scale.dtype).reshape(logit_scale.shape)
    if needs_grad[1]:
        pairs = Pairs(keys, rows, 1 / temperature, logit_scale)
        grad_key, _ = pairs.gradient(by_keys, by_rows, key.dtype)
    return grad_query, grad_key, grad_scale


class Views:
    """nt_xent's arguments: both views of the rows and of the keys, one after the other."""

    def __init__(self, z1, z2, key1, key2, ids, key_ids, offset, temperature, within, across):
        b, n = z1.shape[0], (z1 if key1 is None else key1).shape[0]
        device = z1.device
        self.rows = Rows(torch.cat([z1, z2]), True)
        self.same = key1 is None
        self.keys = self.rows if self.same else Rows(torch.cat([key1, key2]), True)
        ids = torch.arange(b, device=device) if ids is None else ids
        key_ids = ids if self.same else key_ids
        codes = ids.repeat(2), key_ids.repeat(2)
        at = torch.arange(b, device=device) + offset
        self.positive = torch.cat([at + n, at])  # (2B,) among the keys
        self.chosen = torch.full((2 * n,), -1, device=device)  # (2N,) whose positive a key is
        if offset < 0:
            self.positive = torch.full_like(self.positive, -1)
        else:
            self.chosen[self.positive] = torch.arange(2 * b, device=device)
        self.options = 1 / temperature, None, codes, within, across
        self.back = 1 / temperature, None, codes[::-1], within, across

    def pairs(self) -> Pairs:
        return Pairs(self.rows, self.keys, *self.options)

    def gradients(self, weight, lse, needs_rows: bool, needs_keys: bool, dtype):
        own = (weight, lse, self.positive)
        rows = keys = None
        if needs_rows:
            other = own if self.same else None
            rows, _ = self.pairs().gradient(own, other, dtype)
        if needs_keys and not self.same:
            back = Pairs(self.keys, self.rows, *self.back)
            # A key is kept across views if it is the row's positive: by whom it was chosen.
            keys, _ = back.gradient((torch.zeros_like(self.chosen, dtype=torch.float32),
                                     torch.zeros_like(self.chosen, dtype=torch.float32),
                                     self.chosen), own, dtype)  # fmt: skip
        return rows, keys


def nt_xent_forward(
    z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view, mask_cross_view
):
    """(loss (2B,), lse (2B,))"""
    views = Views(z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view,
                   mask_cross_view)  # fmt: skip
    lse, logit, _ = views.pairs().sweep(views.positive)
    return lse - logit, lse


def nt_xent_backward(
    grad_loss, z1, z2, key1, key2, ids, key_ids, lse, offset, temperature, within_view,
    mask_cross_view, needs_grad,
):  # fmt: skip
    views = Views(z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view,
                   mask_cross_view)  # fmt: skip
    rows, keys = views.gradients(
        grad_loss, lse, any(needs_grad[:2]), any(needs_grad[2:4]), z1.dtype
    )
    both = [
        part
        for grad in (rows, keys)
        for part in (grad.chunk(2) if grad is not None else (None, None))
    ]
    return tuple(g if need else None for g, need in zip(both, needs_grad[:4], strict=True))


def _own_logits(query, key, temperature, normalize):
    u, v = (unit_rows(query), unit_rows(key)) if normalize else (wide(query), wide(key))
    return u, v, (u * v).sum(1) / temperature


def info_nce_queue_forward(query, key, queue, temperature, normalize):
    """(loss (B,), lse (B,)): a sweep over the queue, to which each row adds its own key."""
    rows, negatives = Rows(query, normalize), Rows(queue, normalize)
    nobody = torch.full((query.shape[0],), -1, device=query.device)
    lse, _, _ = Pairs(rows, negatives, 1 / temperature).sweep(nobody)
    _, _, own = _own_logits(query, key, temperature, normalize)
    lse = torch.logaddexp(lse, own)
    return lse - own, lse


def info_nce_queue_backward(grad_loss, query, key, queue, lse, temperature, normalize, needs_grad):
    rows, negatives = Rows(query, normalize), Rows(queue, normalize)
    nobody = torch.full((query.shape[0],), -1, device=query.device)
    u, v, own = _own_logits(query, key, temperature, normalize)
    weight = (grad_loss * (torch.exp(own - lse) - 1) / temperature)[:, None]  # (B, 1)

    def back(grad, z):
        return project_back(grad, wide(z)) if normalize else grad

    grad_query = grad_key = None
    if needs_grad[0]:
        pairs = Pairs(rows, negatives, 1 / temperature)
        grad_query, _ = pairs.gradient((grad_loss, lse, nobody), None, torch.float32)
        grad_query = (grad_query + back(weight * v, query)).to(query.dtype)
    if needs_grad[1]:
        grad_key = back(weight * u, key).to(key.dtype)
    return grad_query, grad_key
