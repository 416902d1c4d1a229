"""A strategy for Flower (flwr) whose aggregation is any robust rule.

    strategy = RobustStrategy("multi_krum", rule_options={"f": 1}, fraction_train=0.5)

needs `flwr` 1.21 or newer, ``pip install 'dashpot[flower]'``. Shapes: p replies, S arrays of a
model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from logging import INFO, WARNING

import numpy
import torch
from torch import Tensor

from dashpot.aggregate import RobustAggregator
from dashpot.aggregate._rules import Rule

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.common.logger import log
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"dashpot.flower needs flwr, whose message strategies came with 1.21 ({error}): "
        "pip install 'dashpot[flower]'",
        name="flwr",
    ) from error

__all__ = ["RobustStrategy"]


class RobustStrategy(FedAvg):
    r"""Federated averaging with a robust rule in place of the average.

    The rule aggregates what clients changed, :math:`w \leftarrow w + \mathrm{rule}(w_1 - w, \ldots,
    w_p - w)`, not the weights themselves: rules that look at directions (`flag`) would see p nearly
    equal rows there, and for the others it is the same. Integer and boolean arrays (counters)
    become the entrywise lower median.

    What a client sends cannot end the run: a reply whose arrays differ from the server's in name,
    shape or dtype, or whose metrics differ in kind from most clients', is left out with a warning,
    before the rule is told p. NaN and inf go to the rule, which drops such clients (or not: see the
    rule). If its update is not finite, the round is given up with a warning and the model stays.

    Args:
        rule: the rule's name as in `robust_aggregate`, or a `RobustAggregator`.
        rule_options: of the rule, as in ``{"f": 1}``. f is the number of Byzantine clients among
            those sampled in a round.
        weighted: weight clients by the metric `weighted_by_key`, as FedAvg does. Only for rules
            with an option `weights`; Krum, medians and trimmed means have no weighted form here.
            A Byzantine client may claim any number of examples: off unless asked for.
        fedavg: every argument of `flwr.serverapp.strategy.FedAvg`, with its defaults.

    Raises:
        TypeError, ValueError: naming the argument; from `aggregate_train` if the rule is not
            defined for so few clients.
    """

    def __init__(
        self,
        rule: str | RobustAggregator,
        *,
        rule_options: Mapping | None = None,
        weighted: bool = False,
        **fedavg,
    ) -> None:
        super().__init__(**fedavg)
        if isinstance(rule, str):
            rule = RobustAggregator(rule, **(rule_options or {}))
        elif rule_options or not isinstance(rule, RobustAggregator):
            raise TypeError(
                "rule: expected a name, or a RobustAggregator without rule_options, "
                f"got {type(rule).__name__} and {rule_options}"
            )
        self.rule: Rule = rule.rule
        if weighted and "weights" not in self.rule.options:
            raise ValueError(f"weighted: expected a rule with weights, got {self.rule}")
        self.weighted = weighted
        self._arrays: ArrayRecord | None = None

    def summary(self) -> None:
        """Log the strategy's settings."""
        log(INFO, "\t├──> Robust aggregation: %s%s", self.rule, ", weighted" * self.weighted)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg; keeps the model that clients start from."""
        self._arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The model moved by the rule's update; metrics as FedAvg averages them."""
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        contents = self._well_formed(valid)
        if not contents:
            return None, None
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return self._aggregate([_arrays_of(one) for one in contents], contents), metrics

    def _well_formed(self, replies: Sequence[Message]) -> list[RecordDict]:
        """The contents of replies that can be aggregated; the others are named in the log."""
        kinds = Counter(_kind(reply.content) for reply in replies if _kind(reply.content))
        usual = kinds.most_common(1)[0][0] if kinds else None
        kept = []
        for reply in replies:
            reason = self._fault(reply.content, usual)
            if reason is None:
                kept.append(reply.content)
            else:
                log(WARNING, "aggregate_train: left out node %s: %s",
                    reply.metadata.src_node_id, reason)  # fmt: skip
        return kept

    def _fault(self, content: RecordDict, usual: tuple | None) -> str | None:
        if len(content.array_records) != 1:
            return f"expected one ArrayRecord, got {len(content.array_records)}"
        arrays = _arrays_of(content)
        if set(arrays) != set(self._arrays):
            return f"expected the arrays {sorted(self._arrays)}, got {sorted(arrays)}"
        for name, mine in self._arrays.items():
            want, got = ((tuple(one.shape), one.dtype) for one in (mine, arrays[name]))
            if want != got:
                return f"{name}: expected {want}, got {got}"
        kind = _kind(content)
        if kind is None or self.weighted_by_key not in dict(kind):
            return f"expected one MetricRecord with {self.weighted_by_key!r}"
        return None if kind == usual else "metrics that differ in kind from most clients'"

    def _aggregate(
        self, models: Sequence[ArrayRecord], contents: Sequence[RecordDict]
    ) -> ArrayRecord | None:
        start = {name: _tensor(array) for name, array in self._arrays.items()}
        floats = [name for name, value in start.items() if value.is_floating_point()]
        sent = [{name: _tensor(model[name]) for name in start} for model in models]
        moved = [[_wide(one[name]) - _wide(start[name]) for name in floats] for one in sent]
        update = self._weighted_rule(contents)(moved)
        if not all(one.isfinite().all() for one in update):
            log(WARNING, "aggregate_train: the update is not finite, the model stays as it is")
            return None
        new = dict(zip(floats, update, strict=True))
        result = {}
        for name, value in start.items():
            if name in new:
                result[name] = (_wide(value) + new[name]).to(value.dtype)
            else:
                stacked = torch.stack([one[name] for one in sent])  # (p, ...)
                whole = stacked.to(torch.int64) if value.dtype == torch.bool else stacked
                result[name] = whole.median(0).values.to(value.dtype)
        return ArrayRecord({name: Array(value.numpy()) for name, value in result.items()})

    def _weighted_rule(self, contents: Sequence[RecordDict]) -> Rule:
        if not self.weighted:
            return self.rule
        metrics = [next(iter(one.metric_records.values())) for one in contents]
        weights = [float(one[self.weighted_by_key]) for one in metrics]
        return dataclasses.replace(self.rule, weights=torch.tensor(weights, dtype=torch.float64))


def _arrays_of(content: RecordDict) -> ArrayRecord:
    return next(iter(content.array_records.values()))


def _kind(content: RecordDict) -> tuple | None:
    """Names of the metrics and how many numbers each has; None if they cannot be averaged."""
    if len(content.metric_records) != 1:
        return None
    metrics = next(iter(content.metric_records.values()))
    sizes = {name: len(value) if isinstance(value, list) else 0 for name, value in metrics.items()}
    return tuple(sorted(sizes.items()))


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(numpy.array(array.numpy()))


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
