"""`monna`: the mean of a trusted worker's nearest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, check_int
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.mda_coeffs import check_half
from dashpot.aggregate.multi_krum import SELECTION_SIZES, selection_floor, selection_inputs
from dashpot.aggregate.nnm_coeffs import NNM_COEFFS
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@rule("monna")
class MoNNA(Rule):
    f: int
    idx: int = 0

    def check(self) -> None:
        check_int("f", self.f, 0)
        check_int("idx", self.idx, 0)

    def check_workers(self, p: int) -> None:
        check_half(p, self.f)
        check_int("idx", self.idx, 0, p - 1)

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        return NNM_COEFFS(geometry.sqdist, self.f)[self.idx]


@public
def monna(
    grads: Grads, f: int, idx: int = 0, *, nonfinite: Literal["drop", "raise"] = "drop"
) -> Tensor | list[Tensor]:
    r"""Mean of the p - f workers nearest to a trusted one, itself included: one read of the rows, a
    second of p - f, one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        f: how many workers are left out, 0 <= f, 2 f < p.
        idx: the trusted worker, 0 <= idx < p.
        nonfinite: "drop": a row with NaN or inf is one of the f left out; "raise" raises instead,
            and reads flags on the host.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`; equal distances go to
        the lower index; NaN if the trusted row is bad, or more than f rows are.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the selection held fixed, which is exact wherever it does not jump.

    Source: Robust Collaborative Learning with Linear Gradient Overhead, arXiv 2209.10931.
    """
    return MoNNA(f=f, idx=idx, nonfinite=nonfinite)(grads)


def _monna_inputs(size, dtype, device, seed):
    return *selection_inputs(size, dtype, device, seed), 1


MONNA = chain(
    "monna",
    monna,
    (PAIRWISE_SQDIST, NNM_COEFFS, COMBINE),
    inputs=_monna_inputs,
    floor=lambda grads, f, _idx: selection_floor(grads, len(grads) - f),
    sizes=SELECTION_SIZES,
)
