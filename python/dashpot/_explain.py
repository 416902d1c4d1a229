"""`dashpot.explain`: which backend serves a call, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dashpot._backends import _forced
from dashpot._dispatch import _Trace


@dataclass
class Explanation:
    """What `explain` found: rows of (op, backend, verdict)."""

    rows: list[tuple[str, str, str]]

    @property
    def chosen(self) -> dict[str, str]:
        """{op: the backend that served it}"""
        return {op: name for op, name, verdict in self.rows if verdict.startswith("chosen")}

    def __str__(self) -> str:
        return "\n".join(f"{op:<18} {name:<10} {verdict}" for op, name, verdict in self.rows)

    __repr__ = __str__


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Run `function(*args, **kwargs)` and say, for each op in it, what each backend answered.

    >>> print(dashpot.explain(dashpot.gram, torch.randn(15, 1000)))  # doctest: +SKIP
    """
    trace = _Trace(_forced.get())
    token = _forced.set(trace)
    try:
        function(*args, **kwargs)
    finally:
        _forced.reset(token)
    return Explanation(trace.lines)
