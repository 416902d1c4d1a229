"""`trimmed_mean`: each coordinate's mean without its extremes."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot.aggregate._rows import Grads
from dashpot.aggregate.coordinate_rules import rule_chain, trimming_rule


@public
def trimmed_mean(
    grads: Grads, f: int, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""Mean of each coordinate's values without the f smallest and the f largest.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in
            `coordinate_rules`, which says how ties, NaN and inf count.
        f: values dropped at either end, 0 <= 2 f < p; 0 gives the mean.
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        The mean (...), or a list of S tensors, in the dtype of `grads`; sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    The gradient goes in equal shares to the p - 2 f values of each coordinate.

    Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
    arXiv 1803.01498.
    """
    return trimming_rule(grads, "trimmed_mean", f, out)


TRIMMED_MEAN = rule_chain(trimmed_mean)
