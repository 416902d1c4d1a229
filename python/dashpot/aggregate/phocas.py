"""`phocas`: each coordinate's mean around its trimmed mean."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot.aggregate._rows import Grads
from dashpot.aggregate.coordinate_rules import rule_chain, trimming_rule


@public
def phocas(
    grads: Grads, f: int, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""Mean of the p - f values nearest the trimmed mean, in each coordinate.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in
            `coordinate_rules`, which says how ties, NaN and inf count.
        f: values left out, and trimmed at either end for the centre, 0 <= 2 f < p; 0 gives the
            mean.
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        The mean (...), or a list of S tensors, in the dtype of `grads`; sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    The gradient goes in equal shares to the p - f values of each coordinate.

    Source: Phocas: dimensional Byzantine-resilient stochastic gradient descent, arXiv 1805.09682.
    """
    return trimming_rule(grads, "phocas", f, out)


PHOCAS = rule_chain(phocas)
