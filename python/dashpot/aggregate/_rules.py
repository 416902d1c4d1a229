"""What every aggregation rule is: a statistic of the rows, a small solve, an update.

    rule = make_rule("krum", f=3, pre=[NNM(3)])
    stat = rule.measure(rows)              # pass 1: (p, p) float64, a sum over coordinates
    solution = rule.solve(stat, p)         # p-space: coefficients c (p,)
    update = rule.apply(grads, rows, solution)   # pass 2: c^T G

Rows cut into slices of coordinates have statistics that add up, and each slice of the update needs
that slice of the rows alone: a distributed caller sums `stat` over its slices between measure and
solve and applies the solution to its own.

Pre-stages replace the p rows by p' combinations M G of them. No row is mixed: the statistic is
(K' = M K M^T, D' from D), and the coefficients are (c = M^T c'); see `_mixing`. Only rules that
work coordinate by coordinate, and have no coefficients, form the mixed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dashpot.aggregate._mixing import Geometry, Stage, carry
from dashpot.aggregate._rows import Grads, Rows, as_rows, check_choice, total
from dashpot.aggregate.combine import _combine
from dashpot.aggregate.gram import GRAM
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST

Statistic = Literal["gram", "sqdist", "both"] | None
Update = Tensor | list[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule with its options; subclasses say what they need and how they solve.

    Options are checked here, in `check`; what depends on p is checked by `solve`, before anything
    is computed. Frozen and picklable.
    """

    pre: tuple[Stage, ...] = ()
    nonfinite: Literal["drop", "raise"] = "drop"

    name: ClassVar[str] = ""
    needs: ClassVar[Statistic] = "sqdist"
    options: ClassVar[tuple[str, ...]] = ()  # its own, and those without a default
    required: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        object.__setattr__(self, "pre", tuple(self.pre))
        for i, stage in enumerate(self.pre):
            if not isinstance(stage, Stage):
                raise TypeError(
                    f"pre[{i}]: expected NNM, Bucketing or Clipping, got {type(stage).__name__}"
                )
        check_choice("nonfinite", self.nonfinite, ("drop", "raise"))
        self.check()

    def check(self) -> None:
        """Raise for an option that no number of workers could take."""

    def check_workers(self, p: int) -> None:
        """Raise where the rule is not defined for p rows."""

    # ---- the three steps

    @property
    def statistic(self) -> Statistic:
        """What `measure` sums: "gram" (p, p); "sqdist" (p, p), squared norms on its diagonal;
        "both" (2, p, p); None: nothing, the rule works coordinate by coordinate."""
        needs = {self.needs, *(stage.needs for stage in self.pre)} - {None}
        matrices = needs - {"norms"}
        if len(matrices) > 1:
            return "both"
        return next(iter(matrices), "gram" if needs else None)

    def measure(self, rows: Rows) -> Tensor | None:
        """The statistic in one read of the rows ("both": two); no gradient."""
        statistic = self.statistic
        with torch.no_grad():
            parts = []
            if statistic in ("gram", "both"):
                parts.append(total([GRAM(group, None, rows.p, "fp32") for group in rows.groups]))
            if statistic in ("sqdist", "both"):
                parts.append(
                    total([PAIRWISE_SQDIST(group, None, rows.p, True) for group in rows.groups])
                )
            return torch.stack(parts) if len(parts) > 1 else parts[0] if parts else None

    def solve(self, stat: Tensor | None, p: int) -> Any:
        """What `apply` takes: c (p,) float64; NaN where more rows are bad than the rule bears.

        The host reads nothing, except for nonfinite="raise".
        """
        geometry = Geometry.of(stat, self.statistic)
        self.check_rows(stat, p)
        if not self.pre:
            self.check_workers(p)
            with torch.no_grad():
                return self.coeffs(geometry, p)
        with torch.no_grad():
            mixing, count = None, p
            for stage in self.pre:
                m = stage.matrix(geometry, count)  # (p', p)
                count = m.shape[0]
                geometry, mixing = geometry.mixed(m), m if mixing is None else carry(m, mixing)
            self.check_workers(count)
            return self.unmix(mixing, self.coeffs(geometry, count))

    def check_rows(self, stat: Tensor | None, p: int) -> None:
        """For nonfinite="raise": reads a flag per worker on the host."""
        if self.nonfinite == "drop" or stat is None:
            return
        bad = (~Geometry.of(stat, self.statistic).alive()[:p]).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"grads: expected finite rows, got NaN or inf from workers {bad}")

    def coeffs(self, geometry: Geometry, p: int) -> Any:
        """The solution for p rows."""
        raise NotImplementedError

    def unmix(self, mixing: Tensor, solution: Any) -> Any:
        """The solution for mixed rows (p',) as one for the rows (p,)."""
        return carry(solution[None], mixing)[0]

    def apply(self, grads: Grads, rows: Rows, solution: Any) -> Update:
        """The update from the rows; gradients flow with the solution held fixed."""
        return _combine(grads, rows, solution, None)

    def __call__(self, grads: Grads) -> Update:
        rows = as_rows(grads)
        if not self.pre:
            self.check_workers(rows.p)
        return self.apply(grads, rows, self.solve(self.measure(rows), rows.p))


RULES: dict[str, type[Rule]] = {}
_COMMON = ("pre", "nonfinite")  # options of every rule


def rule(name: str) -> Callable[[type[Rule]], type[Rule]]:
    """Enter a subclass of Rule, as a frozen dataclass of its options, into the table."""

    def enter(cls: type[Rule]) -> type[Rule]:
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        own = [field for field in dataclasses.fields(cls) if field.name not in _COMMON]
        cls.name = name
        cls.options = tuple(field.name for field in own)
        cls.required = tuple(f.name for f in own if f.default is dataclasses.MISSING)
        RULES[name] = cls
        return cls

    return enter


def make_rule(name: str, *, pre: Sequence[Stage] = (), nonfinite: str = "drop", **opts) -> Rule:
    """The rule of that name with its options, checked."""
    check_choice("rule", name, tuple(sorted(RULES)))
    cls = RULES[name]
    for option in opts:
        if option not in cls.options:
            known = ", ".join(cls.options) or "none"
            raise TypeError(f"{option}: rule {name!r} has the options {known}, not this one")
    for option in cls.required:
        if option not in opts:
            raise TypeError(f"{option}: rule {name!r} needs it")
    return cls(pre=pre, nonfinite=nonfinite, **opts)
