"""The op `pairwise_sqdist`: squared distances between the workers' rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import (
    CHUNK,
    ROW_SIZES,
    Grads,
    as_rows,
    bytes_of,
    check_mask,
    coordinates,
    masked,
    mix,
    random_rows,
    segments,
    square,
    total,
)


def _pairwise_sqdist_reference(
    grads: list[Tensor], mask: Tensor | None, p: int, norms: bool
) -> Tensor:
    """D_ij = sum_k (g_ik - g_jk)^2, (p, p) float64; from differences, not from K. norms: D_ii =
    sum_k g_ik^2, the distance from the origin, in place of 0."""
    out = grads[0].new_zeros((p, p), dtype=torch.float64)
    for rows in segments(grads, p):  # (p, n)
        for part in rows.split(CHUNK // 16, dim=1):
            wide = part.double()
            out = out + torch.stack([(wide - row).square().sum(1) for row in wide.unbind(0)])
            if norms:
                out = out + torch.diag(wide.square().sum(1))
    if mask is not None:
        out = torch.where(mask[:, None] & mask[None, :], out, 0)
    return out


def _pairwise_sqdist_backward(
    grad_sqdist: Tensor, grads: list[Tensor], mask: Tensor | None, p: int, norms: bool
) -> list[Tensor]:
    """dg_i = 2 sum_j (dD_ij + dD_ji)(g_i - g_j), a graph Laplacian times the rows, and for norms
    2 dD_ii g_i."""
    weights, grads = masked(2 * (grad_sqdist + grad_sqdist.mT), grads, mask, p)  # (p, p)
    laplacian = torch.diag(weights.sum(1)) - weights
    if norms:
        laplacian = laplacian + torch.diag(weights.diagonal() / 2)
    return mix(grads, laplacian, p)


def _pairwise_sqdist_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    return grads, None, p, p % 2 == 0


def _pairwise_sqdist_floor(grads, _mask, p, _norms):
    """One read of the rows, a subtraction and a multiply-add per pair and coordinate."""
    return bytes_of(grads) + 8 * p * p, 3 * p * (p - 1) // 2 * coordinates(grads, p)


PAIRWISE_SQDIST = declare(
    "pairwise_sqdist",
    forward="(Tensor[] grads, Tensor? mask, int p, bool norms) -> (Tensor sqdist)",
    backward="(Tensor grad_sqdist, Tensor[] grads, Tensor? mask, int p, bool norms)"
    " -> (Tensor[] grad_grads)",
    reference=_pairwise_sqdist_reference,
    reference_backward=_pairwise_sqdist_backward,
    fake=square,
    inputs=_pairwise_sqdist_inputs,
    floor=_pairwise_sqdist_floor,
    sizes=ROW_SIZES,
)


@public
def pairwise_sqdist(grads: Grads, *, mask: Tensor | None = None, norms: bool = False) -> Tensor:
    r"""Squared distances between the workers' rows, :math:`D_{ij} = \sum_k (g_{ik}-g_{jk})^2`.

    The differences are squared and summed as they are: forming them from the Gram matrix would
    cancel for workers that lie close together.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        mask: (p,) bool; rows with False give 0.
        norms: put the squared norms :math:`|g_i|^2`, the distances from the origin, on the
            diagonal, which is 0 otherwise. They come from the same read.

    Returns:
        D (p, p) float64. A row that holds NaN or inf has non-finite entries, its diagonal entry
        among them; the others have not.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice. Two float32 rows are subtracted in float32, squared and summed as in
    `gram(accum="fp32")`.
    """
    rows = as_rows(grads)
    mask = check_mask(mask, rows)
    return total([PAIRWISE_SQDIST(group, mask, rows.p, norms) for group in rows.groups])
