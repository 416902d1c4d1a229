"""`coordinate_median`: the median of each coordinate."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot.aggregate._rows import Grads
from dashpot.aggregate.coordinate_rules import one_rule, rule_chain, rule_inputs


@public
def coordinate_median(
    grads: Grads, lower: bool = False, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""Median of the workers' values in each coordinate, in one read and one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in
            `coordinate_rules`, which says how NaN and inf count.
        lower: for even p the lower of the middle two values (as `torch.median`, and the Flag
            Aggregator's published code) instead of their mean (as byzfl and NumPy).
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        The median (...), or a list of S tensors, in the dtype of `grads`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    The gradient goes to the middle value, or half to each of the middle two.

    Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
    arXiv 1803.01498.
    """
    if not isinstance(lower, bool):
        raise TypeError(f"lower: expected a bool, got {type(lower).__name__}")
    return one_rule(grads, "lower_median" if lower else "median", 0, out=out)


COORDINATE_MEDIAN = rule_chain(coordinate_median, lambda *args: rule_inputs(*args)[:1])
