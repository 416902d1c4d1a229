"""Norm clipping as a pre-stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dashpot.aggregate._mixing import Geometry, Stage
from dashpot.aggregate._rows import check_float, check_int


@dataclass(frozen=True)
class Clipping(Stage):
    """Pre-stage: a row longer than max_norm is shortened to it, g_i min(1, max_norm / |g_i|)."""

    max_norm: float
    needs: ClassVar[str] = "norms"

    def __post_init__(self):
        check_float("max_norm", self.max_norm)

    def matrix(self, geometry: Geometry, p: int) -> Tensor:
        return _scaling(geometry, p, float(self.max_norm))


@dataclass(frozen=True)
class AdaptiveClipping(Stage):
    """Pre-stage: the floor(2 f (p - f) / p) longest rows are shortened to the length of the next.

    Source: Adaptive Gradient Clipping for Robust Federated Learning, arXiv 2405.14432 (ARC)."""

    f: int
    needs: ClassVar[str] = "norms"

    def __post_init__(self):
        check_int("f", self.f, 0)

    def matrix(self, geometry: Geometry, p: int) -> Tensor:
        check_int("f", self.f, 0, p)
        clipped = 2 * self.f * (p - self.f) // p
        squares = geometry.squares[:p]  # (p,)
        ordered = torch.where(torch.isfinite(squares), squares, torch.inf).sort().values
        return _scaling(geometry, p, ordered[p - clipped - 1].sqrt())


def _scaling(geometry: Geometry, p: int, max_norm) -> Tensor:
    """diag(min(1, max_norm / |g_i|)) (p, p), NaN for bad rows."""
    norm = geometry.squares[:p].sqrt()  # (p,)
    factor = torch.where(norm > max_norm, max_norm / norm, 1.0)
    return torch.diag(torch.where(torch.isfinite(norm), factor, torch.nan))
