"""byzfl's aggregators by their names, arguments and values, on dashpot's kernels.

    from dashpot.aggregate import byzfl
    aggregate = byzfl.MultiKrum(f=3)
    update = aggregate(vectors)

`vectors` is an array or a tensor (p, d), or a list of p of (d,); a NumPy array comes back for NumPy
arrays, a tensor for tensors. Each class has the variant that byzfl 0.0.11 computes: squared
distances to the p - f - 1 nearest for Krum, a mean of p - f for Multi-Krum, three steps from zero
for the geometric median. What differs:

- byzfl turns tensors into float32; here the dtype stays.
- NaN and inf: byzfl's results are NaN, or depend on how sorting treats them (its geometric median
  drops rows with inf). Here such rows are dropped or left out, as the rules' own functions say.
- Clipping and ARC edit byzfl's input; here they return new rows.
- CenteredClipping keeps its last result as the next centre, as byzfl's does. Its argument m, which
  byzfl's own check refuses whatever it is, works.
- Bucketing takes torch's random numbers for NumPy arrays too.
- Krum, MultiKrum, MDA and MoNNA give ties to the lower index; byzfl leaves some to `topk`.
- CAF and SMEA are not here: they start a power iteration from random numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dashpot.aggregate import clipping
from dashpot.aggregate._coordinate import mixed_rows
from dashpot.aggregate._mixing import Stage
from dashpot.aggregate._rows import Rows, as_rows, check_float, check_int
from dashpot.aggregate._rules import Rule, make_rule
from dashpot.aggregate.bucketing import Bucketing as _Bucketing
from dashpot.aggregate.nnm import NNM as _NNM

Vectors = np.ndarray | Tensor | list


def _open(vectors: Vectors) -> tuple[Tensor | list[Tensor], bool]:
    """The vectors as `grads`, and whether they are NumPy's."""
    listed = isinstance(vectors, list)
    first = vectors[0] if listed and vectors else vectors
    if isinstance(first, np.ndarray):
        return torch.from_numpy(np.array(vectors) if listed else vectors), True
    if not isinstance(first, Tensor):
        raise TypeError(
            "vectors: expected a NumPy array, a torch.Tensor or a list of them, "
            f"got {type(vectors).__name__}"
        )
    return vectors, False


class _Named:
    """Prints as it was made."""

    _options: tuple[str, ...] = ()

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)
        return f"{type(self).__name__}({options})"


class _Aggregator(_Named):
    def _rule(self, p: int) -> Rule:
        raise NotImplementedError

    def __call__(self, vectors: Vectors) -> np.ndarray | Tensor:
        grads, numpy = _open(vectors)
        update = self._rule(len(grads))(grads)
        return update.numpy() if numpy else update


class _Faults(_Aggregator):
    """An aggregator with the number of faulty workers as its one argument."""

    _options = ("f",)

    def __init__(self, f: int = 0):
        check_int("f", f, 0)
        self.f = f

    def _check(self, p: int) -> None:
        if 2 * self.f >= p:
            raise ValueError(f"f: expected 2 f < n = {p}, got {self.f}")


class Average(_Aggregator):
    """`mean`."""

    def _rule(self, p: int) -> Rule:
        return make_rule("mean")


class Median(_Aggregator):
    """`coordinate_median`: the mean of the middle two for an even number."""

    def _rule(self, p: int) -> Rule:
        return make_rule("coordinate_median")


class TrMean(_Faults):
    """`trimmed_mean`."""

    def _rule(self, p: int) -> Rule:
        return make_rule("trimmed_mean", f=self.f)


class Meamed(_Faults):
    """`meamed`."""

    def _rule(self, p: int) -> Rule:
        return make_rule("meamed", f=self.f)


class GeometricMedian(_Aggregator):
    """`geometric_median` from zero, T steps, distances of at least nu."""

    _options = ("nu", "T")

    def __init__(self, nu: float = 0.1, T: int = 3):
        check_float("nu", nu, positive=True)
        check_int("T", T, 0)
        self.nu, self.T = nu, T

    def _rule(self, p: int) -> Rule:
        return make_rule("geometric_median", nu=self.nu, n_iter=self.T, tol=0.0, start="zero")


class Krum(_Faults):
    """`krum` with p - f - 1 neighbours."""

    def _rule(self, p: int) -> Rule:
        self._check(p)
        return make_rule("krum", f=self.f, neighbours=p - self.f - 1)


class MultiKrum(_Faults):
    """`multi_krum` with p - f - 1 neighbours and k = p - f."""

    def _rule(self, p: int) -> Rule:
        self._check(p)
        return make_rule("multi_krum", f=self.f, neighbours=p - self.f - 1)


class CenteredClipping(_Aggregator):
    """`centered_clipping`, L steps from m (default zero), which becomes the result of each call."""

    _options = ("L", "tau")

    def __init__(self, m: np.ndarray | Tensor | None = None, L: int = 1, tau: float = 100.0):
        if m is not None and not isinstance(m, np.ndarray | Tensor):
            raise TypeError(f"m: expected an array or a torch.Tensor, got {type(m).__name__}")
        check_int("L", L, 0)
        check_float("tau", tau)
        self.m, self.L, self.tau = m, L, tau

    def _rule(self, p: int) -> Rule:
        center = torch.from_numpy(self.m) if isinstance(self.m, np.ndarray) else self.m
        return make_rule("centered_clipping", tau=self.tau, center=center, n_iter=self.L)

    def __call__(self, vectors: Vectors) -> np.ndarray | Tensor:
        self.m = super().__call__(vectors)
        return self.m


class MDA(_Faults):
    """`mda`."""

    def _rule(self, p: int) -> Rule:
        return make_rule("mda", f=self.f)


class MoNNA(_Faults):
    """`monna`."""

    _options = ("f", "idx")

    def __init__(self, f: int = 0, idx: int = 0):
        super().__init__(f)
        check_int("idx", idx, 0)
        self.idx = idx

    def _rule(self, p: int) -> Rule:
        return make_rule("monna", f=self.f, idx=self.idx)


class _PreAggregator(_Named):
    """Rows (p, d) -> (p', d), formed; a rule's `pre` does the same without forming them."""

    def _stage(self) -> Stage:
        raise NotImplementedError

    def __call__(self, vectors: Vectors) -> np.ndarray | Tensor:
        grads, numpy = _open(vectors)
        rows = as_rows(grads)
        mixed = _mixed(rows, self._stage())
        shape = (len(mixed), *rows.groups[0][0].shape[rows.form == "tensor" :])
        return mixed.numpy() if numpy else mixed.reshape(shape)


def _mixed(rows: Rows, stage: Stage) -> Tensor:
    """(p', d) for one group of one segment."""
    mixing = make_rule("coordinate_median", pre=[stage])
    mixing = mixing.solve(mixing.measure(rows), rows.p)  # (p', p)
    ((chunks,),) = mixed_rows(rows, mixing)
    return torch.cat(list(chunks), dim=1)


class NNM(_PreAggregator):
    """`nnm`: each row becomes the mean of its p - f nearest."""

    _options = ("f",)

    def __init__(self, f: int = 0):
        check_int("f", f, 0)
        self.f = f

    def _stage(self) -> Stage:
        return _NNM(self.f)


class Bucketing(_PreAggregator):
    """`bucketing`: means of s rows in a random order."""

    _options = ("s",)

    def __init__(self, s: int = 1):
        check_int("s", s, 1)
        self.s = s

    def _stage(self) -> Stage:
        return _Bucketing(self.s)


class Clipping(_PreAggregator):
    """Rows longer than c are shortened to it."""

    _options = ("c",)

    def __init__(self, c: float = 2.0):
        check_float("c", c)
        self.c = c

    def _stage(self) -> Stage:
        return clipping.Clipping(self.c)


class ARC(_PreAggregator):
    """Adaptive clipping: the floor(2 f (p - f) / p) longest rows to the length of the next."""

    _options = ("f",)

    def __init__(self, f: int = 0):
        check_int("f", f, 0)
        self.f = f

    def _stage(self) -> Stage:
        return clipping.AdaptiveClipping(self.f)
