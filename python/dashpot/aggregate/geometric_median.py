"""`geometric_median`: the point of least total distance."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, check_choice, random_grads
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.geometric_median_coeffs import (
    GEOMETRIC_MEDIAN_COEFFS,
    as_weights,
    check_geometric_median,
)
from dashpot.aggregate.multi_krum import SELECTION_SIZES, selection_floor
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@rule("geometric_median")
class GeometricMedian(Rule):
    nu: float = 1e-6
    n_iter: int = 100
    tol: float = 1e-10
    start: str = "mean"
    weights: Tensor | None = None

    def check(self) -> None:
        check_geometric_median(self.nu, self.n_iter, self.tol)
        check_choice("start", self.start, ("mean", "zero"))
        if self.weights is not None and self.pre:
            raise ValueError("weights: expected none where pre-stages mix the workers")

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        zero = self.start == "zero"
        c, _ = GEOMETRIC_MEDIAN_COEFFS(
            geometry.bordered() if zero else geometry.sqdist,
            as_weights(self.weights, p, geometry.device), float(self.nu), self.n_iter,
            float(self.tol), "last" if zero else "mean",
        )  # fmt: skip
        return c[:p]


@public
def geometric_median(
    grads: Grads,
    *,
    nu: float = 1e-6,
    n_iter: int = 100,
    tol: float = 1e-10,
    start: Literal["mean", "zero"] = "mean",
    weights: Tensor | None = None,
    nonfinite: Literal["drop", "raise"] = "drop",
) -> Tensor | list[Tensor]:
    r"""The geometric median :math:`\arg\min_z \sum_i a_i |z - g_i|`: two reads of the rows and one
    write, however many steps it takes.

    Weiszfeld's steps run on the squared distances; see `geometric_median_coeffs`. In float64 these
    resolve the other rows beside one of length L to about sqrt(1e-16 L spread), which is beyond
    the spread itself from L of 1e16 spreads on: clip rows that may be so long before.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        nu: distances count as at least this, > 0, on the gradients' scale (geom-median: 1e-6;
            byzfl: 0.1, where rows shorter than that give their mean).
        n_iter: most steps (geom-median: 100; byzfl: 3).
        tol: stop when no coefficient moves by more than this part of itself; 0 for all steps.
        start: "mean", or "zero" (byzfl).
        weights: (p,) a_i >= 0, sample counts for example; by default 1.
        nonfinite: "drop" leaves out a row with NaN or inf; "raise" raises instead, and reads flags
            on the host.

    Returns:
        The median (...), or a list of S tensors, in the dtype of `grads`; NaN if no row is left, or
        a weight is negative or not finite.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the coefficients held fixed, :math:`dg_i = c_i\,du`: what autograd gives
    through the last step alone with its weights fixed, not the derivative of the median, whose
    coefficients move with the rows.
    """
    return GeometricMedian(
        nu=nu, n_iter=n_iter, tol=tol, start=start, weights=weights, nonfinite=nonfinite
    )(grads)


def _geometric_median_inputs(size, dtype, device, seed):
    return (random_grads(size, dtype, device, seed),)


GEOMETRIC_MEDIAN = chain(
    "geometric_median",
    geometric_median,
    (PAIRWISE_SQDIST, GEOMETRIC_MEDIAN_COEFFS, COMBINE),
    inputs=_geometric_median_inputs,
    floor=lambda grads: selection_floor(grads, len(grads)),
    sizes=SELECTION_SIZES,
)
