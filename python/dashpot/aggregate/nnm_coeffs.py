"""The op `nnm_coeffs`: nearest-neighbour mixing as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_int, check_sqdist, random_sqdist


def clean_distances(sqdist: Tensor) -> Tensor:
    """(p, p): inf where a row is bad (its diagonal entry is not finite) or a distance overflowed;
    the diagonal too, for a row is not its own neighbour."""
    sqdist = sqdist.detach()
    alive = torch.isfinite(sqdist.diagonal())  # (p,)
    usable = alive[:, None] & alive[None, :] & torch.isfinite(sqdist)
    usable = usable & ~torch.eye(sqdist.shape[0], dtype=torch.bool, device=sqdist.device)
    return torch.where(usable, sqdist, torch.inf)


def _nnm_coeffs_reference(sqdist: Tensor, f: int) -> Tensor:
    """M_ij = 1 / (p - f) for the p - f rows j nearest to row i, itself first and ties to the lower
    index, else 0: (p, p). NaN for a row that is bad or lacks so many good neighbours."""
    p = sqdist.shape[0]
    alive = torch.isfinite(sqdist.diagonal())  # (p,)
    eye = torch.eye(p, dtype=torch.bool, device=sqdist.device)
    distance = torch.where(eye, -1, clean_distances(sqdist))  # (p, p)
    order = distance.argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)  # of each j in row i
    found = torch.isfinite(distance).sum(1) >= p - f  # (p,)
    mixing = (rank < p - f).to(sqdist.dtype) / (p - f)
    return torch.where((alive & found)[:, None], mixing, torch.nan)


def _nnm_coeffs_inputs(size, dtype, device, seed):
    return random_sqdist(size, device, seed), size[0] // 4


def _nnm_coeffs_floor(sqdist, _f):
    """D in, M out; a comparison per entry of a row for each of its entries."""
    p = sqdist.shape[0]
    return 16 * p * p, p**3


NNM_COEFFS = declare(
    "nnm_coeffs",
    forward="(Tensor sqdist, int f) -> (Tensor mixing)",
    reference=_nnm_coeffs_reference,
    fake=lambda sqdist, f: torch.empty_like(sqdist),
    inputs=_nnm_coeffs_inputs,
    floor=_nnm_coeffs_floor,
    sizes={"test": [(2, 9), (5, 40), (15, 300), (33, 500)], "bench": [(15, 300), (60, 700)]},
)


@public
def nnm_coeffs(sqdist: Tensor, f: int) -> Tensor:
    r"""Mixing matrix of nearest-neighbour mixing from the squared distances alone.

    Row i of :math:`M G` is the mean of the p - f rows nearest to :math:`g_i`, itself included.

    Args:
        sqdist: (p, p) float64 or float32 squared distances; symmetric. A worker whose diagonal
            entry is not finite is bad; otherwise the diagonal is not read.
        f: how many workers may be bad, 0 <= f < p.

    Returns:
        M (p, p) float64, entries 1/(p - f) and 0. The row of a bad worker is NaN, and so is one
        that lacks p - f good neighbours (more than f workers bad). On CUDA nothing is read by the
        host. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity,
    arXiv 2302.01772. Ties go to the lower index.
    """
    sqdist = check_sqdist(sqdist)
    check_int("f", f, 0, sqdist.shape[0] - 1)
    return NNM_COEFFS(sqdist, f)
