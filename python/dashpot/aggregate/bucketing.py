"""Bucketing: means of random groups of rows; `bucketing`, and the pre-stage Bucketing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot.aggregate._mixing import Geometry, Stage
from dashpot.aggregate._rows import Grads, as_rows, check_int


@dataclass(frozen=True)
class Bucketing(Stage):
    """Pre-stage: a random permutation, then means of s consecutive rows (the last of fewer).

    generator: where the permutation comes from; default torch's global one of the device. It
    advances with every call, so two calls differ.
    """

    s: int
    generator: torch.Generator | None = None

    def __post_init__(self):
        check_int("s", self.s, 1)
        _check_generator(self.generator)

    def matrix(self, geometry: Geometry, p: int) -> Tensor:
        return _buckets(p, self.s, self.generator, geometry.device)


@public
def bucketing(grads: Grads, s: int, generator: torch.Generator | None = None) -> Tensor:
    r"""Mixing matrix of bucketing: the workers in a random order, means of s at a time.

    No row is read; fold M into what comes next, as ``robust_aggregate(pre=[Bucketing(s)])`` does.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`; only p and
            the device count.
        s: rows of a bucket, at least 1; the last bucket may be smaller.
        generator: source of the permutation; default torch's global one. One on another device
            than the rows costs a copy between them.

    Returns:
        M (ceil(p / s), p) float64, rows that sum to 1. No gradient flows to it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, arXiv 2006.09365.
    """
    rows = as_rows(grads)
    check_int("s", s, 1)
    _check_generator(generator)
    return _buckets(rows.p, s, generator, rows.groups[0][0].device)


def _buckets(p: int, s: int, generator: torch.Generator | None, device) -> Tensor:
    """M (ceil(p / s), p): worker perm[j] is in bucket j // s."""
    if generator is None:
        order = torch.randperm(p, device=device)
    else:
        order = torch.randperm(p, generator=generator, device=generator.device).to(device)
    count = -(-p // s)
    bucket = order.argsort() // s  # (p,)
    number = torch.arange(count, device=device)  # (p',)
    size = torch.full((count,), s, dtype=torch.float64, device=device)
    size[-1] = p - (count - 1) * s
    return torch.where(bucket[None, :] == number[:, None], 1 / size[:, None], 0)


def _check_generator(generator) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
