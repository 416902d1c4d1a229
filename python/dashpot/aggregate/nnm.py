"""Nearest-neighbour mixing: `nnm`, and the pre-stage NNM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry, Stage
from dashpot.aggregate._rows import (
    Grads,
    as_rows,
    bytes_of,
    check_int,
    coordinates,
    random_grads,
    tensors_of,
    total,
)
from dashpot.aggregate.nnm_coeffs import NNM_COEFFS
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@dataclass(frozen=True)
class NNM(Stage):
    """Pre-stage: row i becomes the mean of the p - f rows nearest to it, itself included."""

    f: int
    needs: ClassVar[str] = "sqdist"

    def __post_init__(self):
        check_int("f", self.f, 0)

    def matrix(self, geometry: Geometry, p: int) -> Tensor:
        check_int("f", self.f, 0, p - 1)
        return NNM_COEFFS(geometry.sqdist[:p, :p].contiguous(), self.f)


@public
def nnm(grads: Grads, f: int) -> Tensor:
    r"""Mixing matrix of nearest-neighbour mixing: row i of :math:`M G` is the mean of the p - f
    rows nearest to :math:`g_i`, itself included.

    The rows are read once and none is mixed: fold M into what comes next,
    :math:`K' = M K M^T` and :math:`c = M^T c'`, as ``robust_aggregate(pre=[NNM(f)])`` does.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        f: how many workers may be bad, 0 <= f < p.

    Returns:
        M (p, p) float64; see `nnm_coeffs`. No gradient flows to it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Fixing by Mixing, arXiv 2302.01772.
    """
    rows = as_rows(grads)
    check_int("f", f, 0, rows.p - 1)
    with torch.no_grad():
        sqdist = total([PAIRWISE_SQDIST(group, None, rows.p, True) for group in rows.groups])
        return NNM_COEFFS(sqdist, f)


def _nnm_inputs(size, dtype, device, seed):
    return random_grads(size, dtype, device, seed), size[-2] // 4


def _nnm_floor(grads, _f):
    """One read of the rows; a subtraction and a multiply-add per pair and coordinate."""
    tensors, p = tensors_of(grads), len(grads)
    return bytes_of(tensors) + 8 * p * p, 3 * p * (p - 1) // 2 * coordinates(tensors, p)


NNM_CHAIN = chain(
    "nnm",
    nnm,
    (PAIRWISE_SQDIST, NNM_COEFFS),
    inputs=_nnm_inputs,
    floor=_nnm_floor,
    sizes={"test": [(3, 17), (15, 1000)], "bench": [(15, 100_000), (15, 1_000_000)]},
    differentiable=False,
)
