"""`mda`: minimum-diameter averaging."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.mda_coeffs import MDA_COEFFS, check_half, check_mda
from dashpot.aggregate.multi_krum import SELECTION_SIZES, selection_floor, selection_inputs
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@rule("mda")
class MDA(Rule):
    f: int

    def check(self) -> None:
        check_mda(self.f)

    def check_workers(self, p: int) -> None:
        check_half(p, self.f)

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        return MDA_COEFFS(geometry.sqdist, self.f)[0]


@public
def mda(
    grads: Grads, f: int, *, nonfinite: Literal["drop", "raise"] = "drop"
) -> Tensor | list[Tensor]:
    r"""Mean of the p - f workers whose largest distance from each other is least, found exactly:
    one read of the rows, a second of p - f, one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        f: how many workers are left out, 0 <= f, 2 f < p, f <= 32: the search takes about
            :math:`1.47^f` steps at worst, see `mda_coeffs`.
        nonfinite: "drop": a row with NaN or inf is one of the f left out; "raise" raises instead,
            and reads flags on the host.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`; of several subsets of
        least diameter the first in lexicographic order; NaN if more than f rows are bad.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the subset held fixed, which is exact wherever it does not jump.

    Source: The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv 1802.07927.
    """
    return MDA(f=f, nonfinite=nonfinite)(grads)


MDA_CHAIN = chain(
    "mda",
    mda,
    (PAIRWISE_SQDIST, MDA_COEFFS, COMBINE),
    inputs=selection_inputs,
    floor=lambda grads, f: selection_floor(grads, len(grads) - f),
    sizes=SELECTION_SIZES,
)
