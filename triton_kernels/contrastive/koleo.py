"""Triton kernels of `koleo_loss` and `regularized_info_nce`.

sweep      (logits.py) the nearest key of each row; for K neighbours K sweeps, each for the
           first after the one before in the order (cosine, index)
distance   d_ik = |u_i - v_n_k(i) + eps| and -(1/K) sum_k log(d_ik + eps): a program per row
pull       -g_i / (K d (d + eps)) (u_i - v_n + eps), added to row i and taken from row n. A
           program owns a row: its own pulls, then those of the rows that chose it, which lie
           side by side after a sort by neighbour. No atomics, one order of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from dashpot.triton_kernels.contrastive.logits import Pairs, Rows, Views, project_rows
from dashpot.triton_kernels.contrastive.pairs import block_of
from torch import Tensor

_EPS = 1e-8  # of regularized_info_nce


@triton.jit
def _koleo_distance_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr,  # rows (m, d), keys (n, d); inverses if RAW
    nearest_ptr,  # (m, topk) int64
    distance_ptr, loss_ptr,  # (m, topk), (m,) float32, written
    d, topk, eps,
    BLOCK: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(x_inverse_ptr + row) if RAW else 1.0
    loss = eps * 0
    for a in range(topk):
        at = row * topk + a
        key = tl.load(nearest_ptr + at)
        its = tl.load(y_inverse_ptr + key) if RAW else 1.0
        total = tl.zeros((BLOCK,), tl.float32)
        for k in range(0, d, BLOCK):
            place = k + tl.arange(0, BLOCK)
            live = place < d
            u = tl.load(x_ptr + row * d + place, mask=live, other=0.0).to(tl.float32) * own
            v = tl.load(y_ptr + key * d + place, mask=live, other=0.0).to(tl.float32) * its
            gap = tl.where(live, u - v + eps, 0.0)
            total += gap * gap
        distance = tl.sqrt(tl.sum(total, 0))
        tl.store(distance_ptr + at, distance)
        loss -= tl.log(distance + eps)
    tl.store(loss_ptr + row, loss / topk)


@triton.jit
def _koleo_pull_kernel(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr,  # the program's rows (m, d), the others (n, d)
    nearest_ptr, weight_ptr,  # (m, topk), read if OWN: a row's neighbours, and what they weigh
    begin_ptr, order_ptr,  # (m + 1,), (pulls,) int64, read if CHOSEN: who chose a row
    their_weight_ptr,  # (n, topk) float32, read if CHOSEN
    grad_ptr,  # (m, d) float32, written
    d, topk, eps,
    BLOCK: tl.constexpr, RAW: tl.constexpr, OWN: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = tl.load(x_inverse_ptr + row) if RAW else 1.0
    for k in range(0, d, BLOCK):
        place = k + tl.arange(0, BLOCK)
        live = place < d
        u = tl.load(x_ptr + row * d + place, mask=live, other=0.0).to(tl.float32) * own
        grad = tl.zeros((BLOCK,), tl.float32)
        if OWN:
            for a in range(topk):
                key = tl.load(nearest_ptr + row * topk + a)
                its = tl.load(y_inverse_ptr + key) if RAW else 1.0
                v = tl.load(y_ptr + key * d + place, mask=live, other=0.0).to(tl.float32) * its
                grad += tl.load(weight_ptr + row * topk + a) * (u - v + eps)
        if CHOSEN:
            for at in range(tl.load(begin_ptr + row), tl.load(begin_ptr + row + 1)):
                pull = tl.load(order_ptr + at)
                other = pull // topk
                its = tl.load(y_inverse_ptr + other) if RAW else 1.0
                v = tl.load(y_ptr + other * d + place, mask=live, other=0.0).to(tl.float32) * its
                grad -= tl.load(their_weight_ptr + pull) * (v - u + eps)
        tl.store(grad_ptr + row * d + place, grad, mask=live)


def _spread(rows: Rows, keys: Rows, nearest: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(loss (m,), distances (m, topk)); without another row 0 and 1."""
    m, topk = nearest.shape
    distance = torch.ones((m, topk), dtype=torch.float32, device=nearest.device)
    loss = torch.zeros(m, dtype=torch.float32, device=nearest.device)
    if m and keys.n > 1:
        _koleo_distance_kernel[(m,)](
            rows.x, keys.x, rows.inverse, keys.inverse, nearest, distance, loss, rows.d, topk, eps,
            BLOCK=block_of(rows.d), RAW=rows.raw, num_warps=1,
        )  # fmt: skip
    return loss, distance


def _pulls(rows: Rows, keys: Rows, nearest: Tensor, distance: Tensor, grad: Tensor, eps: float,
           needs_keys: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dL/du (m, d) and, for keys that are not the rows, dL/dv (n, d); grad (m,) of the losses."""
    m, topk = nearest.shape
    alike = keys is rows
    weight = -grad.float()[:, None] / (topk * distance * (distance + eps))  # (m, topk)
    by_rows = torch.zeros((m, rows.d), dtype=torch.float32, device=weight.device)
    by_keys = torch.zeros((keys.n, rows.d), device=weight.device) if needs_keys else None
    if not m or keys.n <= 1 or not rows.d:
        return by_rows, by_keys
    chosen, order = nearest.reshape(-1).sort(stable=True)
    begin = torch.searchsorted(chosen, torch.arange(keys.n + 1, device=weight.device))

    def launch(own, other, out, is_own, is_chosen):
        _koleo_pull_kernel[(own.n,)](
            own.x, other.x, own.inverse, other.inverse, nearest, weight, begin, order, weight, out,
            rows.d, topk, eps, BLOCK=block_of(rows.d), RAW=rows.raw, OWN=is_own, CHOSEN=is_chosen,
            num_warps=1,
        )  # fmt: skip

    launch(rows, keys, by_rows, True, alike)
    if needs_keys:
        launch(keys, rows, by_keys, False, True)
    return by_rows, by_keys


def _both(z: Tensor, keys: Tensor | None, eps: float, normalize: bool) -> tuple[Rows, Rows]:
    rows = Rows(z, normalize, eps)
    return rows, rows if keys is None else Rows(keys, normalize, eps)


def koleo_loss_forward(z, keys, offset, topk, eps, normalize):
    """(loss (B,), nearest (B, K))"""
    rows, others = _both(z, keys, eps, normalize)
    nearest = torch.zeros((rows.n, topk), dtype=torch.int64, device=z.device)
    last = None
    for k in range(topk if others.n > topk else 0):
        last = Pairs(rows, others).nearest(offset, last)
        nearest[:, k] = last[1]
    loss, _ = _spread(rows, others, nearest, eps)
    return loss, nearest


def koleo_loss_backward(grad_loss, z, keys, nearest, topk, eps, normalize, needs_grad):
    rows, others = _both(z, keys, eps, normalize)
    _, distance = _spread(rows, others, nearest, eps)
    needs_keys = keys is not None and needs_grad[1]
    by_rows, by_keys = _pulls(rows, others, nearest, distance, grad_loss, eps, needs_keys)
    grad_keys = project_rows(others, by_keys[None], keys.dtype)[0] if needs_keys else None
    return project_rows(rows, by_rows[None], z.dtype)[0], grad_keys


def regularized_info_nce_forward(
    z1, z2, ids, temperature, within_view, mask_cross_view, with_gradient
):
    """(loss (), koleo (), then both by z1 and both by z2, (B, D) or (0, D)): one sweep for the
    logits and the neighbours."""
    b = z1.shape[0]
    views = Views(z1, z2, None, None, ids, None, 0, temperature, within_view, mask_cross_view)
    lse, logit, nearest = views.pairs().sweep(views.positive, nearest=True)
    weight = torch.full_like(lse, 0.5 / max(1, b))
    # Both views in one launch: the neighbours of a view lie in that view. A view of one row has
    # none.
    near = nearest[:, None]
    spread, distance = _spread(views.rows, views.rows, near, _EPS)
    spread = spread if b > 1 else spread * 0
    grads = [lse.new_empty((0, z1.shape[1])) for _ in range(4)]
    if any(with_gradient):
        by_loss, _ = views.gradients(weight, lse, True, False, torch.float32)
        pulls, _ = _pulls(views.rows, views.rows, near, distance,
                          weight if b > 1 else weight * 0, _EPS, False)  # fmt: skip
        by_koleo, _ = project_rows(views.rows, pulls[None], torch.float32)
        for at in range(2):
            if with_gradient[at]:
                grads[2 * at : 2 * at + 2] = (
                    part.chunk(2)[at].contiguous() for part in (by_loss, by_koleo)
                )
    loss = (lse - logit).sum() * (0.5 / max(1, b))
    return loss, spread.sum() * (0.5 / max(1, b)), *grads
