"""`trimmed_mean`: each coordinate's mean without its extremes."""

from __future__ import annotations

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._rows import Grads, as_rows
from dashpot.aggregate.coordinate_rules import (
    COORDINATE_RULES,
    RULE_SIZES,
    check_f,
    one_rule,
    rule_floor,
    rule_inputs,
)


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
    rows = as_rows(grads)
    check_f(f, rows.p)
    return one_rule(grads, "trimmed_mean", f, out=out, rows=rows)


TRIMMED_MEAN = chain(
    "trimmed_mean",
    trimmed_mean,
    (COORDINATE_RULES,),
    inputs=rule_inputs,
    floor=rule_floor,
    sizes=RULE_SIZES,
)
