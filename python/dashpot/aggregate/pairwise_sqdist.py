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


def _pairwise_sqdist_reference(grads: list[Tensor], mask: Tensor | None, p: int) -> Tensor:
    """D_ij = sum_k (g_ik - g_jk)^2, (p, p) float64; from differences, not from K."""
    out = grads[0].new_zeros((p, p), dtype=torch.float64)
    for rows in segments(grads, p):  # (p, n)
        for part in rows.split(CHUNK // 16, dim=1):
            wide = part.double()
            out = out + torch.stack([(wide - row).square().sum(1) for row in wide.unbind(0)])
    if mask is not None:
        out = torch.where(mask[:, None] & mask[None, :], out, 0)
    return out


def _pairwise_sqdist_backward(
    grad_sqdist: Tensor, grads: list[Tensor], mask: Tensor | None, p: int
) -> list[Tensor]:
    """dg_i = 2 sum_j (dD_ij + dD_ji)(g_i - g_j): a graph Laplacian times the rows."""
    weights, grads = masked(2 * (grad_sqdist + grad_sqdist.mT), grads, mask, p)  # (p, p)
    return mix(grads, torch.diag(weights.sum(1)) - weights, p)


def _pairwise_sqdist_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    return grads, None, p


def _pairwise_sqdist_floor(grads, _mask, p):
    """One read of the rows, a subtraction and a multiply-add per pair and coordinate."""
    return bytes_of(grads) + 8 * p * p, 3 * p * (p - 1) // 2 * coordinates(grads, p)


PAIRWISE_SQDIST = declare(
    "pairwise_sqdist",
    forward="(Tensor[] grads, Tensor? mask, int p) -> (Tensor sqdist)",
    backward="(Tensor grad_sqdist, Tensor[] grads, Tensor? mask, int p) -> (Tensor[] grad_grads)",
    reference=_pairwise_sqdist_reference,
    reference_backward=_pairwise_sqdist_backward,
    fake=square,
    inputs=_pairwise_sqdist_inputs,
    floor=_pairwise_sqdist_floor,
    sizes=ROW_SIZES,
)


@public
def pairwise_sqdist(grads: Grads, *, mask: Tensor | None = None) -> Tensor:
    r"""Squared distances between the workers' rows, :math:`D_{ij} = \sum_k (g_{ik}-g_{jk})^2`.

    The differences are squared and summed as they are: forming them from the Gram matrix would
    cancel for workers that lie close together.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        mask: (p,) bool; rows with False give 0.

    Returns:
        D (p, p) float64, zero on the diagonal.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice. Two float32 rows are subtracted in float32, squared and summed as in
    `gram(accum="fp32")`.
    """
    rows = as_rows(grads)
    mask = check_mask(mask, rows)
    return total([PAIRWISE_SQDIST(group, mask, rows.p) for group in rows.groups])
