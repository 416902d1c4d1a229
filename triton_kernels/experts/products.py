"""Grouped matrix products: one tile of one segment's rows a program.

Which segment a program has is found on the device from the ends, so that no count is read by the
host. Rows come through `order` (no permuted copy), bias and activation are the epilogue, and for
one choice a token the rows leave through `order` too. Programs past the last tile write the zeros
of the rows past the end. Weight gradients are a product over a segment's rows, zeros where it has
none. For two products of T k rows this saves two reads and two writes of (T k, d) and the passes
for bias and activation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dashpot.triton_kernels.experts.rows import columns, sum_rows
from torch import Tensor

_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == 2:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        z = z / (1.0 + tl.exp(-z))
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        bell = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * bell
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        return s * (1.0 + z * (1.0 - s))


@triton.jit
def _grouped_kernel(
    a_ptr,  # (R, K), or (T, K) if GATHER
    w_ptr,  # (E, N, K) with any strides of N and K; N is doubled if GATED
    bias_ptr,  # (E, N), read if HAS_BIAS
    offsets_ptr,  # (E,)
    order_ptr,  # (R,), read if GATHER or SCATTER
    weights_ptr,  # (T, 1), read if HAS_WEIGHTS
    out_ptr,  # (R, n), or (T, n) if SCATTER
    pre_ptr,  # (R, N), what goes into the activation, written if SAVE
    slots,
    n,  # columns of out
    inner,  # K
    experts,
    w_expert,  # strides of w
    w_row,
    w_column,
    k,
    E: tl.constexpr,  # a power of two, at least experts + 1
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    # Segment `experts` is what lies past the last end: it has tiles, but no product.
    e = tl.arange(0, E)  # (E,)
    ends = tl.load(offsets_ptr + e, mask=e < experts, other=slots)
    ends = tl.minimum(ends, slots)
    starts = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= experts), other=0)
    tiles = tl.where(e <= experts, (ends - starts + BM - 1) // BM, 0)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    if expert <= experts:
        mine = e == expert
        first = tl.sum(tl.where(mine, until - tiles, 0), 0)
        begin = tl.sum(tl.where(mine, starts, 0), 0)
        stop = tl.sum(tl.where(mine, ends, 0), 0)
        row = begin + (tile - first) * BM + tl.arange(0, BM)  # (BM,) int64
        inside = row < stop
        source = row
        target = row
        live = inside & (expert < experts)
        if GATHER or SCATTER:
            flat = tl.load(order_ptr + row, mask=inside, other=-1).to(tl.int64)
            live = live & (flat >= 0)
            if GATHER:
                source = flat // k
            if SCATTER:
                target = flat
                inside = live
        column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # (BN,)
        wide = column < n
        chosen = tl.minimum(expert, experts - 1).to(tl.int64)
        a_row = a_ptr + source * inner  # (BM,)
        w_base = w_ptr + chosen * w_expert + column * w_row  # (BN,)
        z = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        for c in range(0, tl.where(expert < experts, inner, 0), BK):
            at = c + tl.arange(0, BK)  # (BK,)
            deep = at < inner
            a = tl.load(a_row[:, None] + at[None, :], mask=live[:, None] & deep[None, :], other=0.0)
            w_at = w_base[None, :] + at[:, None] * w_column  # (BK, BN)
            w_in = deep[:, None] & wide[None, :]
            w = tl.load(w_at, mask=w_in, other=0.0)
            if WIDE:
                a = a.to(tl.float32)
                w = w.to(tl.float32)
            z += tl.dot(a, w, input_precision=PRECISION)
            if GATED:
                w = tl.load(w_at + n * w_row, mask=w_in, other=0.0).to(w.dtype)
                up += tl.dot(a, w, input_precision=PRECISION)
        width = n * 2 if GATED else n
        if HAS_BIAS:
            b_at = bias_ptr + chosen * width + column
            some = wide & (expert < experts)
            z += tl.load(b_at, mask=some, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(b_at + n, mask=some, other=0.0).to(tl.float32)[None, :]
        there = inside[:, None] & wide[None, :]
        if SAVE:
            kept = pre_ptr + row[:, None] * width + column[None, :]
            tl.store(kept, z.to(pre_ptr.dtype.element_ty), mask=there)
            if GATED:
                tl.store(kept + n, up.to(pre_ptr.dtype.element_ty), mask=there)
        z = _activate(z, ACTIVATION)
        if GATED:
            z = z * up
        if HAS_WEIGHTS:
            z = z * tl.load(weights_ptr + target, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(
            out_ptr + target[:, None] * n + column[None, :], z.to(out_ptr.dtype.element_ty),
            mask=there,
        )  # fmt: skip


@triton.jit
def _grouped_outer_kernel(
    a_ptr,  # (R, N), or (T, N) if GATHER_A
    b_ptr,  # (R, K), or (T, K) if GATHER_B
    offsets_ptr,  # (E,)
    order_ptr,  # (R,), read if GATHER_A or GATHER_B
    weights_ptr,  # (T, k), read if HAS_WEIGHTS: a factor of A's rows
    out_ptr,  # (E, N, K) = sum of a_r b_r^T over the rows of each segment
    sum_ptr,  # (E, N) = sum of a_r, written if SUM
    slots,
    n,
    m,  # K
    k,
    scale,  # of A's rows
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # (BN,)
    other = tl.program_id(2).to(tl.int64) * BK + tl.arange(0, BK)  # (BK,)
    stop = tl.minimum(tl.load(offsets_ptr + expert), slots)
    begin = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    total = tl.zeros((BN, BK), tl.float32)
    sums = tl.zeros((BN,), tl.float32)
    for r in range(begin, stop, BM):
        row = (r + tl.arange(0, BM)).to(tl.int64)  # (BM,)
        live = row < stop
        a_row = row
        b_row = row
        if GATHER_A or GATHER_B:
            flat = tl.load(order_ptr + row, mask=live, other=-1).to(tl.int64)
            live = live & (flat >= 0)
            if GATHER_A:
                a_row = flat // k
            if GATHER_B:
                b_row = flat // k
        a_at = a_ptr + a_row[:, None] * n + column[None, :]
        a = tl.load(a_at, mask=live[:, None] & (column < n)[None, :], other=0.0)  # (BM, BN)
        if HAS_WEIGHTS:
            w = tl.load(weights_ptr + flat, mask=live, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * w[:, None]).to(a_ptr.dtype.element_ty)
        b_at = b_ptr + b_row[:, None] * m + other[None, :]
        b = tl.load(b_at, mask=live[:, None] & (other < m)[None, :], other=0.0)  # (BM, BK)
        if SUM:
            sums += tl.sum(a.to(tl.float32), 0)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total += tl.dot(tl.trans(a), b, input_precision=PRECISION)
    at = out_ptr + expert * n * m + column[:, None] * m + other[None, :]
    there = (column < n)[:, None] & (other < m)[None, :]
    tl.store(at, (total * scale).to(out_ptr.dtype.element_ty), mask=there)
    if SUM and tl.program_id(2).to(tl.int64) == 0:
        done = (sums * scale).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + expert * n + column, done, mask=column < n)


@triton.jit
def _activate_backward_kernel(
    pre_ptr,  # (R, h) or (R, 2h)
    u_ptr,  # (R, h) = W2^T dy
    dy_ptr,  # (T, d)
    b2_ptr,  # (E, d), read if HAS_BIAS
    offsets_ptr,  # (E,)
    order_ptr,  # (R,)
    weights_ptr,  # (T, k), read if HAS_WEIGHTS
    hidden_ptr,  # (R, h)
    dz_ptr,  # the shape of pre
    dw_ptr,  # (T, k), written if HAS_WEIGHTS
    h,
    d,
    k,
    experts,
    scale,  # of every slot, where there are no weights
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):
    """A slot a program: a = act(z), dz = w u act'(z), dw = <a, u> + <b2, dy>."""
    row = tl.program_id(0).to(tl.int64)
    flat = tl.load(order_ptr + row).to(tl.int64)
    live = flat >= 0
    w = tl.where(live, scale, 0.0)
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + flat, mask=live, other=0.0).to(tl.float32)
    width = h * 2 if GATED else h
    dot = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, h, BLOCK):
        column = c + tl.arange(0, BLOCK)  # (BLOCK,)
        there = live & (column < h)
        inside = column < h
        z = tl.load(pre_ptr + row * width + column, mask=there, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + row * h + column, mask=there, other=0.0).to(tl.float32)
        a = _activate(z, ACTIVATION)
        dz = w * u * _slope(z, ACTIVATION)
        if GATED:
            up = tl.load(pre_ptr + row * width + h + column, mask=there, other=0.0).to(tl.float32)
            dup = (w * u * a).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + row * width + h + column, dup, mask=inside)
            dz = dz * up
            a = a * up
        tl.store(dz_ptr + row * width + column, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        tl.store(hidden_ptr + row * h + column, a.to(hidden_ptr.dtype.element_ty), mask=inside)
        dot += a * u
    if HAS_WEIGHTS:
        if HAS_BIAS:
            e = tl.arange(0, E)  # (E,)
            ends = tl.load(offsets_ptr + e, mask=e < experts, other=2147483647)
            expert = tl.sum((ends <= row).to(tl.int64), 0)
            for c in range(0, d, BLOCK):
                column = c + tl.arange(0, BLOCK)
                there = live & (column < d) & (expert < experts)
                b2 = tl.load(b2_ptr + expert * d + column, mask=there, other=0.0).to(tl.float32)
                at = dy_ptr + (flat // k) * d + column
                dot += b2 * tl.load(at, mask=there, other=0.0).to(tl.float32)
        tl.store(dw_ptr + flat, tl.sum(dot, 0).to(dw_ptr.dtype.element_ty), mask=live)


def _precision(x: Tensor) -> dict:
    """How tl.dot multiplies; the interpreter takes bfloat16 for its bits, so it gets float32."""
    wide = triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
    return {"PRECISION": "tf32x3" if x.dtype == torch.float32 else "ieee", "WIDE": wide}


def _grouped(
    a: Tensor, w: Tensor, bias: Tensor | None, offsets: Tensor, order: Tensor | None, slots: int,
    n: int, *, transposed: bool = False, k: int = 0, weights: Tensor | None = None,
    out: Tensor | None = None, pre: Tensor | None = None, activation: str | None = None,
    gated: bool = False,
) -> Tensor:  # fmt: skip
    """out (R, n) = epilogue(A_e W_e^T) (W_e if transposed); k > 0: A's rows come through order, k
    choices a token. out, if given, is (T, n), written through order."""
    scatter = out is not None
    if out is None:
        out = torch.empty((slots, n), dtype=a.dtype, device=a.device)
    if not slots or not n:
        return out
    experts = w.shape[0]
    # Addresses of rows that are not aligned fill registers, and so do the parts of a float32.
    aligned = n % 16 == 0 and a.shape[1] % 16 == 0
    most = (128 if aligned else 64) if a.dtype != torch.float32 else 64 if aligned else 32
    bm = min(most, max(16, triton.next_power_of_2(triton.cdiv(slots, experts))))
    bn = min(64 if gated else most, max(16, triton.next_power_of_2(n)))
    strides = (w.stride(0), w.stride(2), w.stride(1)) if transposed else w.stride()
    grid = (triton.cdiv(slots, bm) + experts + 1, triton.cdiv(n, bn))
    _grouped_kernel[grid](
        a, w, a if bias is None else bias, offsets, offsets if order is None else order,
        a if weights is None else weights, out, out if pre is None else pre, slots, n, a.shape[1],
        experts, *strides, max(1, k), E=triton.next_power_of_2(experts + 1), BM=bm, BN=bn, BK=32,
        GATHER=k > 0, SCATTER=scatter, HAS_BIAS=bias is not None, HAS_WEIGHTS=weights is not None,
        ACTIVATION=_ACTIVATIONS[activation], GATED=gated, SAVE=pre is not None,
        **_precision(a), num_warps=8 if bm * bn >= 2048 else 4,
    )  # fmt: skip
    return out


def _outer(
    a: Tensor, b: Tensor, offsets: Tensor, order: Tensor | None, bias: bool, *, k: int = 1,
    gather_a: bool = False, gather_b: bool = False, weights: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(E, N, K) = A_e^T B_e, and the sums of A's rows (E, N) if bias."""
    experts, n, m = offsets.shape[0], a.shape[1], b.shape[1]
    slots = (b if gather_a else a).shape[0]
    out = torch.empty((experts, n, m), dtype=a.dtype, device=a.device)
    sums = torch.empty((experts, n), dtype=a.dtype, device=a.device) if bias else None
    most = 64 if n % 16 == 0 and m % 16 == 0 else 32  # as above
    bn, bk = (min(most, max(16, triton.next_power_of_2(size))) for size in (n, m))
    grid = (experts, triton.cdiv(n, bn), max(1, triton.cdiv(m, bk)))
    if n:
        _grouped_outer_kernel[grid](
            a, b, offsets, offsets if order is None else order, a if weights is None else weights,
            out, out if sums is None else sums, slots, n, m, k, scale, BM=32, BN=bn, BK=bk,
            GATHER_A=gather_a, GATHER_B=gather_b, HAS_WEIGHTS=weights is not None, SUM=bias,
            **_precision(a), num_warps=8 if bn * bk >= 2048 else 4,
        )  # fmt: skip
    return out, sums


def _many_experts(experts: int) -> str | None:
    return None if experts < 4096 else f"takes fewer than 4096 experts, got {experts}"


def grouped_linear_supports(xp, weight, bias, offsets) -> str | None:
    return _many_experts(weight.shape[0])


def grouped_linear_forward(
    xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """(R, K), (E, N, K) -> (R, N)"""
    return _grouped(xp, weight, bias, offsets, None, xp.shape[0], weight.shape[1])


def grouped_linear_backward(
    grad_y: Tensor, xp: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, needs_grad
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(R, N) -> (R, K), (E, N, K), (E, N)"""
    grad_xp = grad_weight = grad_bias = None
    if needs_grad[0]:
        grad_xp = _grouped(
            grad_y, weight, None, offsets, None, xp.shape[0], xp.shape[1], transposed=True
        )
    wants_bias = needs_grad[2] and bias is not None
    if needs_grad[1] or wants_bias:
        grad_weight, grad_bias = _outer(grad_y, xp, offsets, None, wants_bias)
    return grad_xp, grad_weight if needs_grad[1] else None, grad_bias


def expert_mlp_supports(x, order, rank, offsets, w1, *rest) -> str | None:
    return _many_experts(w1.shape[0])


def expert_mlp_forward(
    x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, weights: Tensor | None, activation: str, gated: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(T, d) -> (T, d), and the pre-activation (R, N) if save"""
    slots, k, d = order.shape[0], rank.shape[1], x.shape[1]
    pre = torch.empty((slots if save else 0, w1.shape[1]), dtype=x.dtype, device=x.device)
    hidden = _grouped(
        x, w1, b1, offsets, order, slots, w2.shape[2], k=k, pre=pre if save else None,
        activation=activation, gated=gated,
    )  # fmt: skip
    if k == 1:  # rows leave through order; those of dropped tokens stay 0
        y = torch.zeros_like(x)
        return _grouped(hidden, w2, b2, offsets, order, slots, d, weights=weights, out=y), pre
    out = _grouped(hidden, w2, b2, offsets, None, slots, d)
    return sum_rows(out, rank, weights, 1.0 if weights is not None else 1 / k), pre


def expert_mlp_backward(
    grad_y: Tensor, x: Tensor, order: Tensor, rank: Tensor, offsets: Tensor, w1: Tensor,
    b1: Tensor | None, w2: Tensor, b2: Tensor | None, weights: Tensor | None, pre: Tensor,
    activation: str, gated: bool, needs_grad,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(T, d) -> the gradients of x, w1, b1, w2, b2, weights"""
    slots, k, d = order.shape[0], rank.shape[1], x.shape[1]
    experts, hidden_size = w1.shape[0], w2.shape[2]
    scale = 1.0 if weights is not None else 1 / k
    u = _grouped(grad_y, w2, None, offsets, order, slots, hidden_size, transposed=True, k=k)
    hidden, dz = torch.empty_like(u), torch.empty_like(pre)
    dweights = None if weights is None else torch.zeros_like(weights)
    if slots:
        _activate_backward_kernel[(slots,)](
            pre, u, grad_y, u if b2 is None else b2, offsets, order,
            u if weights is None else weights, hidden, dz, u if dweights is None else dweights,
            hidden_size, d, k, experts, scale,
            E=triton.next_power_of_2(experts), BLOCK=min(1024, columns(hidden_size)),
            ACTIVATION=_ACTIVATIONS[activation], GATED=gated, HAS_BIAS=b2 is not None,
            HAS_WEIGHTS=weights is not None, num_warps=4,
        )  # fmt: skip
    dx = dw1 = db1 = dw2 = db2 = None
    if needs_grad[0]:
        dx = sum_rows(_grouped(dz, w1, None, offsets, None, slots, d, transposed=True), rank, None)
    if needs_grad[4] or needs_grad[5]:
        dw1, db1 = _outer(dz, x, offsets, order, b1 is not None, k=k, gather_b=True)
    if needs_grad[6] or needs_grad[7]:
        dw2, db2 = _outer(
            grad_y, hidden, offsets, order, b2 is not None, k=k, gather_a=True, weights=weights,
            scale=scale,
        )  # fmt: skip
    made = (dx, dw1, db1, dw2, db2, dweights)
    wanted = (needs_grad[i] for i in (0, 4, 5, 6, 7, 8))
    return tuple(grad if want else None for grad, want in zip(made, wanted, strict=True))
