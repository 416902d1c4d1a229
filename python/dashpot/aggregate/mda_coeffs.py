"""The op `mda_coeffs`: the subset of least diameter, exactly."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import check_int, check_sqdist, random_sqdist
from dashpot.aggregate.nnm_coeffs import clean_distances

MOST_BAD = 32  # 1.47^32 is 2e5 search nodes: under a second
_MOST_SUBSETS = 1 << 20  # what the reference enumerates


def _mda_coeffs_reference(sqdist: Tensor, f: int) -> tuple[Tensor, Tensor]:
    """Among all subsets of p - f rows the first, in lexicographic order, of least max_ij D_ij:
    c = 1/(p - f) on it (p,), and its diameter (). By enumeration, so for few subsets only."""
    p = sqdist.shape[0]
    k = p - f
    if math.comb(p, f) > _MOST_SUBSETS:
        raise ValueError(
            f"f: the reference of mda_coeffs enumerates subsets, expected at most {_MOST_SUBSETS}, "
            f"got {math.comb(p, f)} for p = {p}, f = {f}; the compiled kernels do not"
        )
    distance = clean_distances(sqdist)  # (p, p)
    subsets = torch.tensor(_subsets(p, k), device=sqdist.device)  # (subsets, k)
    single = torch.where(
        torch.isfinite(sqdist.diagonal()), 0, torch.full_like(sqdist[0], torch.inf)
    )
    worst = single[subsets].amax(1)  # (subsets,)
    for a, b in itertools.combinations(range(k), 2):
        worst = torch.maximum(worst, distance[subsets[:, a], subsets[:, b]])  # (subsets,)
    least = worst.amin()
    # Of the equal ones the first: ranks fall along the list.
    first = torch.where(worst == least, torch.arange(len(subsets), 0, -1, device=sqdist.device), 0)
    chosen = subsets.index_select(0, first.argmax()[None])[0]  # (k,)
    inside = (chosen[:, None] == torch.arange(p, device=sqdist.device)).any(0)  # (p,)
    c = inside.to(sqdist.dtype) / k
    found = torch.isfinite(least)
    return torch.where(found, c, torch.nan), torch.where(found, least.sqrt(), torch.nan)


@functools.lru_cache(maxsize=8)
def _subsets(p: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(p), k))


def _mda_coeffs_inputs(size, dtype, device, seed):
    return random_sqdist(size, device, seed), min(4, (size[0] - 1) // 2)


def _mda_coeffs_floor(sqdist, _f):
    """D in, c out; each distance looked at once."""
    p = sqdist.shape[0]
    return 8 * (p * p + p), p * p


MDA_COEFFS = declare(
    "mda_coeffs",
    forward="(Tensor sqdist, int f) -> (Tensor coeffs, Tensor diameter)",
    reference=_mda_coeffs_reference,
    fake=lambda sqdist, f: (sqdist.new_empty(sqdist.shape[0]), sqdist.new_empty(())),
    inputs=_mda_coeffs_inputs,
    floor=_mda_coeffs_floor,
    sizes={"test": [(2, 9), (5, 40), (9, 40), (15, 300)], "bench": [(15, 300)]},
)


@public
def mda_coeffs(sqdist: Tensor, f: int) -> tuple[Tensor, Tensor]:
    r"""Minimum-diameter averaging from the squared distances alone, exactly.

    A subset of diameter at most t is what is left when the rows that cover every pair further
    apart than t are taken away: at most f of them. So t is bisected over the distances, and
    each t is a search for a vertex cover of size f, which branches on the row with most such
    pairs: at most about :math:`1.47^f` nodes, where enumeration takes p choose f.

    Args:
        sqdist: (p, p) float64 or float32 squared distances; symmetric. A worker whose diagonal
            entry is not finite is bad: at distance inf from all; otherwise the diagonal is not
            read.
        f: how many workers are left out, 0 <= f, 2 f < p, f <= 32.

    Returns:
        c (p,) float64, 1/(p - f) for the workers of the subset and 0 for the others; of several
        subsets the first in lexicographic order. diameter () float64. NaN if more than f workers
        are bad. On CUDA nothing is read by the host. No gradient flows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The reference
            also for more than 2^20 subsets, which it would have to enumerate.
    """
    sqdist = check_sqdist(sqdist)
    check_mda(f)
    check_half(sqdist.shape[0], f)
    return MDA_COEFFS(sqdist, f)


def check_mda(f) -> None:
    check_int("f", f, 0)
    if f > MOST_BAD:
        raise ValueError(
            f"f: expected at most {MOST_BAD}, got {f}: the exact search takes time 1.47^f"
        )


def check_half(p: int, f: int) -> None:
    if 2 * f >= p:
        raise ValueError(f"f: expected 2 f < p = {p}, got {f}")
