"""Rules that look at each coordinate by itself, behind the one interface.

They have no coefficients: `solve` gives what a pre-stage made of the rows, and the mixed rows are
formed, some coordinates at a time, by `combine` (which does not read a row of weight 0, so a bad
row spoils only the mixtures it is part of).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, Rows, check_int
from dashpot.aggregate._rules import Rule, Update, rule
from dashpot.aggregate.bulyan import spread_mean
from dashpot.aggregate.bulyan_rows import BULYAN_ROWS, check_bulyan
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.coordinate_rules import check_f, one_rule


def _chunk(device: torch.device) -> int:
    """Coordinates mixed at a time: p rows of them lie in a CPU's cache; a GPU wants many."""
    return 1 << 14 if device.type == "cpu" else 1 << 22


def mixed_rows(rows: Rows, mixing: Tensor) -> Iterator[Iterator[Iterator[Tensor]]]:
    """mixing (p', p) times the rows: for each group, its segments; for each segment, (p', n) of
    some coordinates at a time."""
    device = rows.groups[0][0].device
    weights = mixing.to(device).unbind(0)  # p' of (p,)

    def chunks(own: list[Tensor]) -> Iterator[Tensor]:
        for part in zip(*(row.reshape(-1).split(_chunk(device)) for row in own), strict=True):
            yield torch.stack([COMBINE(list(part), c, rows.p)[0] for c in weights])

    for group in rows.groups:
        tensors = group[0].reshape(rows.p, -1).unbind(0) if len(group) == 1 else group
        yield (chunks(tensors[s : s + rows.p]) for s in range(0, len(tensors), rows.p))


def apply_mixed(
    grads: Grads, rows: Rows, mixing: Tensor, function: Callable[[Tensor], Tensor]
) -> Update:
    """function on the mixed rows, (p', n) -> (n,), some coordinates at a time."""
    outs = [
        [torch.cat([function(mixed) for mixed in chunks]) for chunks in segments]
        for segments in mixed_rows(rows, mixing)
    ]
    return rows.rebuild(outs, grads)


class _Coordinate(Rule):
    needs: ClassVar[None] = None

    def check(self) -> None:
        if self.nonfinite == "raise":
            raise ValueError(
                f"nonfinite: expected 'drop' for rule {self.name!r}, which reads the rows once and "
                "orders NaN above all numbers, got 'raise'"
            )

    def how(self) -> tuple[str, int]:
        """Name and f, as `coordinate_rules` takes them."""
        raise NotImplementedError

    def coeffs(self, geometry: Geometry, p: int) -> None:
        return None

    def unmix(self, mixing: Tensor, solution: Any) -> Tensor:
        return mixing

    def apply(self, grads: Grads, rows: Rows, solution: Tensor | None) -> Update:
        name, f = self.how()
        if solution is None:
            return one_rule(grads, name, f, rows=rows)
        return apply_mixed(grads, rows, solution, lambda mixed: one_rule(mixed, name, f))


@rule("coordinate_median")
class CoordinateMedian(_Coordinate):
    lower: bool = False

    def how(self) -> tuple[str, int]:
        return "lower_median" if self.lower else "median", 0


class _Trimming(_Coordinate):
    def check(self) -> None:
        super().check()
        check_int("f", self.f, 0)

    def check_workers(self, p: int) -> None:
        check_f(self.f, p)

    def how(self) -> tuple[str, int]:
        return self.name, self.f


@rule("trimmed_mean")
class TrimmedMean(_Trimming):
    f: int


@rule("meamed")
class Meamed(_Trimming):
    f: int


@rule("phocas")
class Phocas(_Trimming):
    f: int


@rule("bulyan")
class Bulyan(Rule):
    """solve: which rows are chosen, and of which mixture."""

    f: int

    def check(self) -> None:
        check_int("f", self.f, 0)

    def check_workers(self, p: int) -> None:
        check_bulyan(self.f, p)

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        return BULYAN_ROWS(geometry.sqdist, self.f)

    def unmix(self, mixing: Tensor, solution: Tensor) -> tuple[Tensor, Tensor]:
        return mixing, solution

    def apply(self, grads: Grads, rows: Rows, solution: Any) -> Update:
        if isinstance(solution, Tensor):
            return spread_mean(grads, solution, self.f, rows=rows)
        mixing, chosen = solution
        return apply_mixed(grads, rows, mixing, lambda mixed: spread_mean(mixed, chosen, self.f))
