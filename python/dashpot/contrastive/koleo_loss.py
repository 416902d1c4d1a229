"""The op `koleo_loss`: rows repelled by their nearest neighbours."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._pairs import (
    PAIR_SIZES,
    REDUCTIONS,
    bytes_of,
    check_bool,
    check_choice,
    check_number,
    check_rows,
    project,
    random_rows,
    reduced,
    unit_rows,
    wide,
)


def nearest_rows(u: Tensor, v: Tensor, offset: int, k: int) -> Tensor:
    """The k keys of largest cosine, (B, k) int64, the lowest index among equals; key offset + i is
    row i itself. Where there are no others the entries mean nothing."""
    cosine = u @ v.mT  # (B, N)
    rows = torch.arange(u.shape[0], device=u.device)[:, None] + offset
    itself = rows == torch.arange(v.shape[0], device=u.device)
    cosine = torch.where(itself, -torch.inf, cosine)
    order = torch.sort(cosine.detach(), dim=1, descending=True, stable=True).indices
    if v.shape[0] < k:
        return order.new_zeros((u.shape[0], k))
    return order[:, :k].contiguous()


def repulsion(u: Tensor, v: Tensor, nearest: Tensor, eps: float) -> Tensor:
    """-(1/K) sum_k log(|u_i - v_n_k(i) + eps| + eps) per row, (B,); 0 without another row."""
    if v.shape[0] <= 1:
        return u.sum(1) * 0
    return gap_loss(u[:, None, :] - v[nearest] + eps, eps)


def gap_loss(gap: Tensor, eps: float) -> Tensor:
    """-(1/K) sum_k log(d + eps), d = |gap|; gap (B, K, D)."""
    return -torch.log(torch.linalg.vector_norm(gap, dim=2) + eps).mean(1)


def gap_pull(grad: Tensor, gap: Tensor, eps: float) -> Tensor:
    """w_ik = -g_i gap / (K d (d + eps)), (B, K, D)."""
    d = torch.linalg.vector_norm(gap, dim=2, keepdim=True)  # (B, K, 1)
    return -grad[:, None, None] * gap / (gap.shape[1] * d * (d + eps))


def repulsion_backward(
    grad: Tensor, u: Tensor, v: Tensor, nearest: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """du_i = sum_k w_ik, dv_n -= w_ik for each n = n_k(i): (du, dv)."""
    if v.shape[0] <= 1:
        return torch.zeros_like(u), torch.zeros_like(v)
    pull = gap_pull(grad, u[:, None, :] - v[nearest] + eps, eps)  # (B, K, D)
    # index_put adds in the order of the indices, sorted: without atomics on CUDA.
    at = (nearest.reshape(-1),)
    grad_v = torch.zeros_like(v).index_put(at, -pull.flatten(0, 1), accumulate=True)
    return pull.sum(1), grad_v


def _koleo_loss_reference(
    z: Tensor, keys: Tensor | None, offset: int, topk: int, eps: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    """loss_i = -(1/K) sum_k log(|u_i - v_n_k(i) + eps| + eps), (B,), and n (B, K): the keys of
    largest cosine (product, if rows are not normalised) without the row itself."""
    u = unit_rows(z, eps) if normalize else wide(z)
    v = u if keys is None else unit_rows(keys, eps) if normalize else wide(keys)
    nearest = nearest_rows(u, v, offset, topk)
    return repulsion(u, v, nearest, eps), nearest


def _koleo_loss_backward(
    grad_loss: Tensor, z: Tensor, keys: Tensor | None, nearest: Tensor, topk: int, eps: float,
    normalize: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """du_i += w_i, dv_n(i) -= w_i, then through the normalisation."""
    u = unit_rows(z, eps) if normalize else wide(z)
    v = u if keys is None else unit_rows(keys, eps) if normalize else wide(keys)
    grad_u, grad_v = repulsion_backward(grad_loss.to(u.dtype), u, v, nearest, eps)

    def back(grad: Tensor, rows: Tensor) -> Tensor:
        return project(grad, rows, eps) if normalize else grad.to(rows.dtype)

    if keys is None:
        return back(grad_u + grad_v, z), None
    return back(grad_u, z), back(grad_v, keys) if needs_grad[1] else None


def _koleo_loss_inputs(size, dtype, device, seed):
    """One neighbour; two where 3 divides the batch."""
    n = size[0]
    return random_rows(*size, dtype, device, seed), None, 0, 1 + (n % 3 == 0 and n > 2), 1e-8, True


def _koleo_loss_floor(z, keys, *_):
    """One read, a number per row; the products of each pair once."""
    n = (z if keys is None else keys).shape[0]
    flops = 2 * z.shape[0] * n * z.shape[1] // (2 if keys is None else 1)
    return bytes_of(z, keys) + 4 * z.shape[0] + 4, flops


KOLEO_LOSS = declare(
    "koleo_loss",
    forward="(Tensor z, Tensor? keys, int offset, int topk, float eps, bool normalize)"
    " -> (Tensor loss, Tensor nearest)",
    backward="(Tensor grad_loss, Tensor z, Tensor? keys, Tensor nearest, int topk, float eps,"
    " bool normalize, bool[] needs_grad) -> (Tensor grad_z, Tensor grad_keys)",
    reference=_koleo_loss_reference,
    reference_backward=_koleo_loss_backward,
    inputs=_koleo_loss_inputs,
    floor=_koleo_loss_floor,
    sizes=PAIR_SIZES,
    public=1,
)


@public
def koleo_loss(
    z: Tensor,
    *,
    topk: int = 1,
    eps: float = 1e-8,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group=None,
) -> Tensor:
    r"""KoLeo: the rows' log distances to their nearest neighbours, without the matrix of cosines.

    .. math:: L_i = -\frac1K \sum_k \log(\|u_i - u_{n_k(i)} + \epsilon\| + \epsilon)

    The neighbours are those of largest cosine, never the row itself; among equals the lowest index.

    Args:
        z: (B, D) float64, float32, bfloat16 or float16; u are its normalised rows.
        topk: K, from 1 to B - 1.
        eps: > 0, the least norm to divide by, and what keeps distances from 0 (1e-8: DINOv2). An
            exact duplicate gives a value of about 17 and a gradient of about 1 / eps, never NaN.
        normalize: False takes the rows as they are, and products in place of cosines.
        reduction: "mean", "sum" or "none".
        group: a `torch.distributed` process group: neighbours are looked for among the rows of all
            its ranks (as DINOv3 does; DINOv2 looks in the local batch alone); the loss is that of
            the local rows, gradients are summed over the ranks.

    Returns:
        () or, for "none", (B,); float32, or float64 for float64 inputs. A single row has loss 0 and
        gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Sablayrolles et al., arXiv 1806.03198, as in DINOv2.
    """
    z, eps = _checked(z, topk, eps, normalize, reduction)
    keys, offset = None, 0
    if group is not None:
        from dashpot.contrastive._distributed import gathered

        keys, offset = gathered(z, group)
    _check_topk(topk, (z if keys is None else keys).shape[0])
    return reduced(KOLEO_LOSS(z, keys, offset, topk, eps, normalize), reduction)


@public
def ring_koleo_loss(
    z: Tensor,
    *,
    group,
    topk: int = 1,
    eps: float = 1e-8,
    normalize: bool = True,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""`koleo_loss` with `group` whose rows travel round a ring of ranks instead of being gathered.

    A rank holds one block of other rows at a time, and the K nearest of each of its own so far: its
    memory does not grow with the number of ranks. Gradients travel home the same way.

    Args:
        z: (B, D) the rank's rows; B is the same on every rank.
        group: a `torch.distributed` process group; None is the default one.
        topk: K, from 1 to the number of all ranks' rows less one.
        eps: as in `koleo_loss`.
        normalize: as in `koleo_loss`.
        reduction: "mean", "sum" or "none", over the local rows.

    Returns:
        () or (B,), as `koleo_loss` with `group`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    from dashpot.contrastive._distributed import ring_neighbours, ring_size

    z, eps = _checked(z, topk, eps, normalize, reduction)
    _check_topk(topk, ring_size(z, group))
    u = unit_rows(z, eps) if normalize else wide(z)
    return reduced(ring_neighbours(u, topk, eps, group), reduction)


def _checked(z, topk, eps, normalize, reduction) -> tuple[Tensor, float]:
    check_rows(z, "z")
    eps = check_number(eps, "eps")
    check_bool("normalize", normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(topk, int) or isinstance(topk, bool):
        raise TypeError(f"topk: expected an int, got {type(topk).__name__}")
    return z.contiguous(), eps


def _check_topk(topk: int, count: int) -> None:
    if not 1 <= topk <= max(1, count - 1):
        raise ValueError(f"topk: expected 1 <= topk <= B - 1 = {count - 1}, got {topk}")
