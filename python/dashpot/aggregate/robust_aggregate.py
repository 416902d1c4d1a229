"""One call for every rule: `robust_aggregate`, and `RobustAggregator` to keep one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate import _coordinate as _coordinate  # enters its rules into the table
from dashpot.aggregate._mixing import Stage
from dashpot.aggregate._rows import Grads
from dashpot.aggregate._rules import make_rule
from dashpot.aggregate.flag_aggregate import FLAG_AGGREGATE


@public
def robust_aggregate(
    grads: Grads,
    rule: str = "flag",
    *,
    pre: Sequence[Stage] = (),
    nonfinite: Literal["drop", "raise"] = "drop",
    **opts,
) -> Tensor | list[Tensor]:
    r"""Aggregate p workers' gradients by a rule, after pre-stages.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in `gram`.
        rule: "flag", "krum", "multi_krum", "mda", "monna", "geometric_median",
            "centered_clipping", "mean", "coordinate_median", "trimmed_mean", "meamed", "phocas" or
            "bulyan".
        pre: `NNM`, `Bucketing`, `Clipping` or `AdaptiveClipping` objects, in the order in which
            they are applied. They cost no pass over the rows beyond the distances they need,
            except before rules that sort coordinates: those need the mixed rows themselves, which
            are formed some coordinates at a time.
        nonfinite: "drop" or "raise", as in the rule's own function; rules that sort coordinates
            take "drop" alone and treat NaN as `coordinate_rules` says.
        opts: the rule's options, named as in its own function.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the coefficients held fixed.
    """
    return make_rule(rule, pre=pre, nonfinite=nonfinite, **opts)(grads)


class RobustAggregator:
    """A rule with its options, checked once: ``aggregate = RobustAggregator("krum", f=3)``, then
    ``update = aggregate(grads)``. Arguments as in `robust_aggregate`. Can be pickled.
    """

    def __init__(
        self,
        rule: str = "flag",
        pre: Sequence[Stage] = (),
        *,
        nonfinite: Literal["drop", "raise"] = "drop",
        **opts,
    ):
        self.rule = make_rule(rule, pre=pre, nonfinite=nonfinite, **opts)
        self._given = {"pre": list(pre)} if pre else {}
        self._given |= {"nonfinite": nonfinite} if nonfinite != "drop" else {}
        self._given |= opts

    def __call__(self, grads: Grads) -> Tensor | list[Tensor]:
        return _aggregate(grads, self.rule)

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in self._given.items()]
        return f"RobustAggregator({', '.join([repr(self.rule.name), *given])})"


@public
def _aggregate(grads: Grads, rule) -> Tensor | list[Tensor]:
    return rule(grads)


ROBUST_AGGREGATE = chain(
    "robust_aggregate",
    robust_aggregate,
    FLAG_AGGREGATE.ops,
    inputs=FLAG_AGGREGATE.inputs,
    floor=FLAG_AGGREGATE.floor,
    sizes={"test": [(15, 1000)], "bench": [(15, 1_000_000)]},
)
