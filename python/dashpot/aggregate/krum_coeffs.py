"""The op `krum_coeffs`: Krum's scores, and the coefficients of the workers it selects."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_int, check_sqdist, random_sqdist
from dashpot.aggregate.nnm_coeffs import clean_distances


def _krum_coeffs_reference(
    sqdist: Tensor, k: int, neighbours: int, squared: bool
) -> tuple[Tensor, Tensor]:
    """score_i = sum of the distances from row i to its nearest others, (p,), inf for rows that are
    bad or lack good neighbours; c = 1/k for the k least, ties to the lower index: (p,)."""
    distance = clean_distances(sqdist)  # (p, p)
    if not squared:
        distance = distance.sqrt()
    scores = distance.sort(dim=1).values[:, :neighbours].sum(1)  # (p,)
    rank = scores.argsort(stable=True).argsort()  # (p,)
    c = (rank < k).to(sqdist.dtype) / k
    return torch.where(torch.isfinite(scores).sum() >= k, c, torch.nan), scores


def _krum_coeffs_inputs(size, dtype, device, seed):
    p = size[0]
    return random_sqdist(size, device, seed), max(1, p // 3), max(1, p - p // 4 - 2), p % 2 == 1


def _krum_coeffs_floor(sqdist, _k, _neighbours, _squared):
    """D in, c and scores out; a comparison per entry of a row for each of its entries."""
    p = sqdist.shape[0]
    return 8 * (p * p + 2 * p), p**3


KRUM_COEFFS = declare(
    "krum_coeffs",
    forward="(Tensor sqdist, int k, int neighbours, bool squared)"
    " -> (Tensor coeffs, Tensor scores)",
    reference=_krum_coeffs_reference,
    fake=lambda sqdist, *_: (sqdist.new_empty(sqdist.shape[0]), sqdist.new_empty(sqdist.shape[0])),
    inputs=_krum_coeffs_inputs,
    floor=_krum_coeffs_floor,
    sizes={"test": [(2, 9), (5, 40), (15, 300), (33, 500)], "bench": [(15, 300), (60, 700)]},
)


@public
def krum_coeffs(
    sqdist: Tensor,
    f: int,
    *,
    k: int | None = 1,
    neighbours: int | None = None,
    squared: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Krum and Multi-Krum from the squared distances alone.

    Args:
        sqdist: (p, p) float64 or float32 squared distances; symmetric. A worker whose diagonal
            entry is not finite is bad: at distance inf from all; otherwise the diagonal is not
            read.
        f, k, neighbours, squared: see `multi_krum`; here k = 1 unless it is given.

    Returns:
        c (p,) float64, 1/k for the k workers of least score and 0 for the others; NaN if fewer
        than k have a finite score. scores (p,) float64. On CUDA nothing is read by the host. No
        gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    sqdist = check_sqdist(sqdist)
    check_krum(f, k, neighbours, squared)
    return KRUM_COEFFS(sqdist, *krum_sizes(sqdist.shape[0], f, k, neighbours), squared)


def check_krum(f, k, neighbours, squared) -> None:
    """What no number of workers could allow."""
    check_int("f", f, 0)
    if k is not None:
        check_int("k", k, 1)
    if neighbours is not None:
        check_int("neighbours", neighbours, 1)
    if not isinstance(squared, bool):
        raise TypeError(f"squared: expected a bool, got {type(squared).__name__}")


def krum_sizes(p: int, f: int, k: int | None, neighbours: int | None) -> tuple[int, int]:
    """(k, neighbours) for p workers, defaults filled in; raises where Krum is not defined."""
    least = 2 * f + 3 if neighbours is None else 2 * f + 1
    if p < least:
        rule = "2 f + 3" if neighbours is None else "2 f + 1"
        raise ValueError(f"f: expected at least {rule} = {least} workers, got p = {p}")
    k = p - f if k is None else k
    check_int("k", k, 1, p)
    neighbours = p - f - 2 if neighbours is None else neighbours
    check_int("neighbours", neighbours, 1, p - 1)
    return k, neighbours
