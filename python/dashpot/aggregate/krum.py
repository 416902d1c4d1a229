"""`krum`: the worker whose neighbours are nearest."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._rows import Grads
from dashpot.aggregate._rules import rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.krum_coeffs import KRUM_COEFFS
from dashpot.aggregate.multi_krum import (
    SELECTION_SIZES,
    ByScores,
    selection_floor,
    selection_inputs,
)
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@rule("krum")
class Krum(ByScores):
    f: int
    k: ClassVar[int] = 1
    neighbours: int | None = None
    squared: bool = True


@public
def krum(
    grads: Grads,
    f: int,
    *,
    neighbours: int | None = None,
    squared: bool = True,
    nonfinite: Literal["drop", "raise"] = "drop",
) -> Tensor | list[Tensor]:
    r"""The worker of least Krum score: one read of all rows, a second of one, one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        f, neighbours, squared, nonfinite: see `multi_krum`, of which this is k = 1.

    Returns:
        A copy of the selected worker's row (...), or a list of S tensors; the lowest index on
        equal scores; NaN if no worker has a finite score.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow to the selected worker.

    Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017.
    """
    return Krum(f=f, neighbours=neighbours, squared=squared, nonfinite=nonfinite)(grads)


KRUM = chain(
    "krum",
    krum,
    (PAIRWISE_SQDIST, KRUM_COEFFS, COMBINE),
    inputs=selection_inputs,
    floor=lambda grads, _f: selection_floor(grads, 1),
    sizes=SELECTION_SIZES,
)
