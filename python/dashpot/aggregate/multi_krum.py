"""`multi_krum`, in the variants that are in use, and the rules "krum" and "multi_krum"."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import Grads, bytes_of, coordinates, random_grads, tensors_of
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.krum_coeffs import KRUM_COEFFS, check_krum, krum_sizes
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


class ByScores(Rule):
    """Krum and Multi-Krum: the k rows of least score."""

    def check(self) -> None:
        check_krum(self.f, self.k, self.neighbours, self.squared)

    def check_workers(self, p: int) -> None:
        krum_sizes(p, self.f, self.k, self.neighbours)

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        sizes = krum_sizes(p, self.f, self.k, self.neighbours)
        return KRUM_COEFFS(geometry.sqdist, *sizes, self.squared)[0]


@rule("multi_krum")
class MultiKrum(ByScores):
    f: int
    k: int | None = None
    neighbours: int | None = None
    squared: bool = True


@public
def multi_krum(
    grads: Grads,
    f: int,
    *,
    k: int | None = None,
    neighbours: int | None = None,
    squared: bool = True,
    nonfinite: Literal["drop", "raise"] = "drop",
) -> Tensor | list[Tensor]:
    r"""Mean of the k workers of least Krum score: one read of the rows, a second of k, one write.

    The score of a worker is the sum of the (squared) distances to its nearest others; equal
    scores go to the lower index. Libraries differ, and the options give each of them:

    =============================  ============  ==============  =======
    library                        neighbours    squared         k
    =============================  ============  ==============  =======
    Blanchard et al., Flower       p - f - 2     True            chosen
    byzfl                          p - f - 1     True            p - f
    Garfield, official flag code   p - f - 1     False           p - f - 2
    torchjd                        p - f - 2     False           chosen
    =============================  ============  ==============  =======

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        f: how many workers may be bad. p >= 2 f + 3 is asked for (Blanchard et al.), and
            p >= 2 f + 1 where `neighbours` is given, as by the libraries that differ.
        k: how many workers are averaged, 1 <= k <= p; default p - f.
        neighbours: how many distances make a score, 1 <= neighbours <= p - 1; default p - f - 2.
        squared: whether the distances are squared.
        nonfinite: "drop": a row with NaN or inf is at distance inf from all others, so up to f of
            them change nothing but p and f (both less by their number); "raise" raises instead,
            and reads flags on the host.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`; NaN if fewer than k
        workers have a finite score, that is enough neighbours without NaN or inf.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the selection held fixed, which is exact wherever it does not jump.

    Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017.
    """
    return MultiKrum(f=f, k=k, neighbours=neighbours, squared=squared, nonfinite=nonfinite)(grads)


def selection_inputs(size, dtype, device, seed):
    """grads and f, for rules that select rows."""
    p = size[1] if size[0] == "lists" else size[0]
    return random_grads(size, dtype, device, seed), (p - 3) // 4


def selection_floor(grads, kept: int) -> tuple[int, int]:
    """One read of the rows with a subtraction and a multiply-add per pair and coordinate, a second
    read of the rows kept, one write."""
    tensors, p = tensors_of(grads), len(grads)
    row = bytes_of(tensors) // p
    return (p + kept + 1) * row, (3 * p * (p - 1) // 2 + 2 * kept) * coordinates(tensors, p)


# One tensor; parameter lists; more rows than a register tile.
SELECTION_SIZES = {
    "test": [(3, 17), (15, 1000), ("lists", 7, 33, 1, 1500)],
    "bench": [(15, 100_000), (15, 1_000_000), (15, 10_000_000)],
}

MULTI_KRUM = chain(
    "multi_krum",
    multi_krum,
    (PAIRWISE_SQDIST, KRUM_COEFFS, COMBINE),
    inputs=selection_inputs,
    floor=lambda grads, f: selection_floor(grads, len(grads) - f),
    sizes=SELECTION_SIZES,
)
