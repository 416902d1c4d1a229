"""The op `bulyan_rows`: Bulyan's choice of rows, repeated Krum on their squared distances."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_tensor, random_rows


def _bulyan_rows_reference(sqdist: Tensor, f: int) -> Tensor:
    """p - 2 f times: of the r rows that remain take the one whose max(1, r - f - 2) nearest others
    have the smallest sum of squared distances, the first such row on ties. sqdist (p, p) -> (p,)
    bool. A distance that is not finite counts as infinite; rows with no finite distance come last.
    """
    p = sqdist.shape[0]
    d = torch.where(sqdist.isfinite(), sqdist.detach(), torch.inf).double()
    self = torch.eye(p, dtype=torch.bool, device=d.device)
    d = torch.where(self, torch.inf, d)
    lost = d.isinf().all(1)  # (p,)
    largest = torch.finfo(torch.float64).max
    chosen = torch.zeros_like(lost)
    for remaining in range(p, 2 * f, -1):
        others = torch.where(chosen, torch.inf, d).sort(dim=1).values  # (p, p), chosen ones last
        k = max(1, remaining - f - 2)
        score = others[:, :k].cumsum(1)[:, -1].clamp(max=largest)  # in the order of the kernels
        rank = torch.where(chosen, 2, lost.to(torch.int64))  # (p,)
        score = torch.where(rank == rank.min(), score, torch.inf)
        chosen = chosen | (torch.arange(p, device=d.device) == score.argmin())
    return chosen


def _bulyan_rows_fake(sqdist: Tensor, f: int) -> Tensor:
    return sqdist.new_empty((sqdist.shape[0],), dtype=torch.bool)


def _bulyan_rows_inputs(size, dtype, device, seed):
    """Distances of random rows, with the largest f that p allows."""
    (rows,), p = random_rows(size, torch.float64, device, seed)
    return torch.cdist(rows, rows).square(), (p - 3) // 4


def _bulyan_rows_floor(sqdist, f):
    """The distances in, the choice out; an addition for each distance of each score."""
    p = sqdist.shape[0]
    return 8 * p * p + p, sum(r * max(1, r - f - 2) for r in range(2 * f + 1, p + 1))


BULYAN_ROWS = declare(
    "bulyan_rows",
    forward="(Tensor sqdist, int f) -> (Tensor chosen)",
    reference=_bulyan_rows_reference,
    fake=_bulyan_rows_fake,
    inputs=_bulyan_rows_inputs,
    floor=_bulyan_rows_floor,
    sizes={"test": [(3, 4), (7, 30), (15, 40), (60, 50), (131, 30)],
           "bench": [(7, 300), (15, 300), (60, 700)]},
)  # fmt: skip


@public
def bulyan_rows(sqdist: Tensor, f: int) -> Tensor:
    r"""The p - 2 f rows that Bulyan keeps, chosen one by one by Krum among those that remain.

    Of r remaining rows the next one is
    :math:`\arg\min_i \sum_{j \in N_i} D_{ij}`, :math:`N_i` its max(1, r - f - 2) nearest among the
    others; the first row on ties.

    Args:
        sqdist: (p, p) float64 or float32 squared distances, as of `pairwise_sqdist`, p >= 4 f + 3;
            the diagonal is not read. An entry that is not finite counts as an infinite distance; a
            row without a finite entry is not chosen while others remain.
        f: workers that may be bad, f >= 0.

    Returns:
        chosen (p,) bool with p - 2 f True entries. No gradient flows, and nothing is read by the
        host on CUDA.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv 1802.07927.
    """
    check_tensor(sqdist, "sqdist")
    if sqdist.dim() != 2 or sqdist.shape[0] != sqdist.shape[1] or sqdist.shape[0] == 0:
        got = tuple(sqdist.shape)
        raise ValueError(f"sqdist: expected a square matrix (p, p), p >= 1, got {got}")
    if sqdist.dtype not in (torch.float64, torch.float32):
        raise TypeError(f"sqdist: expected float64 or float32, got {sqdist.dtype}")
    check_bulyan(f, sqdist.shape[0])
    return BULYAN_ROWS(sqdist.double().contiguous(), f)


def check_bulyan(f, p: int) -> None:
    """f >= 0, p >= 4 f + 3."""
    if not isinstance(f, int) or isinstance(f, bool):
        raise TypeError(f"f: expected an int, got {type(f).__name__}")
    if f < 0 or p < 4 * f + 3:
        raise ValueError(f"f: expected f >= 0 and 4 f + 3 <= p = {p}, got {f}")
