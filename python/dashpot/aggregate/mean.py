"""`mean`: the average, behind the same interface."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, bytes_of, coordinates, random_grads, tensors_of
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.geometric_median_coeffs import as_weights
from dashpot.aggregate.gram import GRAM


@rule("mean")
class Mean(Rule):
    weights: Tensor | None = None

    needs = "gram"

    def check(self) -> None:
        if self.weights is not None and self.pre:
            raise ValueError("weights: expected none where pre-stages mix the workers")

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        alive = geometry.alive()  # (p,)
        a = as_weights(self.weights, p, alive.device)
        a = alive.double() if a is None else torch.where(alive, a, 0)
        total = a.sum()
        valid = ((a >= 0) & torch.isfinite(a)).all() & (total > 0)
        return torch.where(valid, a / total, torch.nan)


@public
def mean(
    grads: Grads,
    weights: Tensor | None = None,
    *,
    nonfinite: Literal["drop", "raise"] = "drop",
) -> Tensor | list[Tensor]:
    r"""The mean :math:`\sum_i a_i g_i / \sum_i a_i` of the rows without NaN or inf: not robust, but
    what the others are compared with.

    Two reads of the rows, as the first one finds those with NaN or inf; where there are none,
    ``combine`` with equal coefficients is the same in one.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        weights: (p,) a_i >= 0, sample counts for example; by default 1.
        nonfinite: "drop" leaves out a row with NaN or inf; "raise" raises instead, and reads flags
            on the host.

    Returns:
        The mean (...), or a list of S tensors, in the dtype of `grads`; NaN if no row is left, or a
        weight is negative or not finite.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients: exact, :math:`dg_i = a_i / \sum a\; du`.
    """
    return Mean(weights=weights, nonfinite=nonfinite)(grads)


def _mean_inputs(size, dtype, device, seed):
    return (random_grads(size, dtype, device, seed),)


def _mean_floor(grads):
    """Two reads of the rows and one write."""
    tensors, p = tensors_of(grads), len(grads)
    row = bytes_of(tensors) // p
    return (2 * p + 1) * row, 4 * p * coordinates(tensors, p)


MEAN = chain(
    "mean",
    mean,
    (GRAM, COMBINE),
    inputs=_mean_inputs,
    floor=_mean_floor,
    sizes={
        "test": [(1, 20), (15, 1000), ("lists", 7, 33, 1, 1500)],
        "bench": [(15, 100_000), (15, 1_000_000)],
    },
)
