"""Pre-stages as mixing matrices, and what a mixture does to the statistics.

A stage turns rows G (p, d) into M G (p', d): neighbour averages, bucket means, clipped rows. With
m_i the rows of M the statistics follow without a look at G:

    K' = M K M^T
    D'_ij = -1/2 (m_i - m_j)^T D (m_i - m_j)        where the rows of M sum to 1

The second is exact and keeps close rows close, where K'_ii + K'_jj - 2 K'_ij would cancel. Rows of
M that do not sum to 1 (clipping) get the origin as one more point, with the rest as its weight; the
distances from the origin are the squared norms that D carries on its diagonal.

A row that holds NaN or inf is *bad*: its diagonal entry is not finite. It must not spoil what does
not use it (0 * NaN), and a mixture that does use it is bad in turn.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

_GAPS = 1 << 20  # numbers of (m_i - m_j) that are formed at a time


class Geometry(NamedTuple):
    """What a rule knows of q points: p rows, and behind them a centre if the rule has one."""

    gram: Tensor | None  # (q, q) float64
    sqdist: Tensor | None  # (q, q) float64, squared norms on its diagonal

    @classmethod
    def of(cls, stat: Tensor | None, statistic: str | None) -> Geometry:
        """From what `Rule.measure` returned. Detached: torch.func does not heed no_grad."""
        stat = None if stat is None else stat.detach()
        if statistic == "both":
            return cls(stat[0], stat[1])
        return cls(stat if statistic == "gram" else None, stat if statistic == "sqdist" else None)

    @property
    def squares(self) -> Tensor:
        """(q,) squared norms, not finite for bad rows."""
        return (self.sqdist if self.gram is None else self.gram).diagonal()

    @property
    def device(self) -> torch.device:
        known = self.sqdist if self.gram is None else self.gram
        return torch.device("cpu") if known is None else known.device

    def alive(self) -> Tensor:
        """(q,) bool: rows without NaN or inf."""
        return torch.isfinite(self.squares)

    def bordered(self) -> Tensor:
        """(q + 1, q + 1) squared distances with the origin as the last point."""
        squares = self.sqdist.diagonal()  # (q,)
        top = torch.cat([self.sqdist - torch.diag(squares.nan_to_num()), squares[:, None]], dim=1)
        return torch.cat([top, torch.cat([squares, squares.new_zeros(1)])[None]])

    def mixed(self, m: Tensor) -> Geometry:
        """The geometry of the rows m G, m (p', p); a centre stays what it is."""
        if self.gram is None and self.sqdist is None:
            return self
        extra = self.squares.shape[0] - m.shape[1]
        if extra:
            m = torch.block_diag(m, torch.eye(extra, dtype=m.dtype, device=m.device))  # (q', q)
        alive = self.alive()  # (q,)
        bad = ((m != 0) & ~alive).any(1) | m.isnan().any(1)  # (q',)
        m = torch.where(bad[:, None], 0, m)
        unknown = bad[:, None] | bad[None, :]  # (q', q')
        both = alive[:, None] & alive[None, :]  # (q, q)
        gram = sqdist = None
        if self.gram is not None:
            gram = torch.where(unknown, torch.nan, m @ torch.where(both, self.gram, 0) @ m.mT)
        if self.sqdist is not None:
            clean = Geometry(None, torch.where(both, self.sqdist, 0)).bordered()  # (q + 1, q + 1)
            sqdist = torch.where(unknown, torch.nan, _mixed_sqdist(clean, m))
        return Geometry(gram, sqdist)


def _mixed_sqdist(clean: Tensor, m: Tensor) -> Tensor:
    """D' (q', q'), squared norms on its diagonal; clean (q + 1, q + 1) with the origin last."""
    rest = 1 - m.sum(1, keepdim=True)
    rest = torch.where(rest.abs() < 1e-12, 0, rest)  # rounding times a huge norm would count
    m = torch.cat([m, rest], dim=1)  # (q', q + 1)
    origin = torch.zeros_like(m[:1])
    origin[:, -1] = 1
    points = torch.cat([m, origin])  # (q' + 1, q + 1)
    parts = []
    for some in m.split(max(1, _GAPS // points.numel())):
        gaps = some[:, None] - points[None]  # (some, q' + 1, q + 1)
        parts.append(((gaps @ clean) * gaps).sum(-1))  # (some, q' + 1)
    out = (-0.5 * torch.cat(parts)).clamp(min=0)  # (q', q' + 1)
    square = out[:, :-1]
    return square - torch.diag(square.diagonal()) + torch.diag(out[:, -1])


def carry(weights: Tensor, rows: Tensor) -> Tensor:
    """weights (a, b) times rows (b, c): what is combined of combinations. A row that is not finite
    counts only where its weight is not 0, and makes NaN of what it counts for."""
    bad = ~torch.isfinite(rows).all(1)  # (b,)
    used = ((weights != 0) & bad).any(1, keepdim=True)  # (a, 1)
    return torch.where(used, torch.nan, weights @ torch.where(bad[:, None], 0, rows))


class Stage:
    """A pre-stage: `matrix` gives M from the rows' geometry. Frozen, checked when made."""

    # What `matrix` reads; "norms" are on the diagonal of either matrix.
    needs: ClassVar[Literal["sqdist", "norms"] | None] = None

    def matrix(self, geometry: Geometry, p: int) -> Tensor:
        """M (p', p) float64; a row of NaN for a mixture that cannot be formed."""
        raise NotImplementedError
