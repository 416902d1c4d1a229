"""`flag_aggregate`: gram, flag_coeffs and combine in a chain."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._mixing import Geometry
from dashpot.aggregate._rows import (
    ROW_SIZES,
    Grads,
    as_rows,
    bytes_of,
    coordinates,
    random_grads,
    tensors_of,
)
from dashpot.aggregate._rules import Rule, rule
from dashpot.aggregate.combine import COMBINE
from dashpot.aggregate.flag_coeffs import FLAG_COEFFS, FlagInfo, _check_flag
from dashpot.aggregate.gram import GRAM


@rule("flag")
class _Flag(Rule):
    m: int | None = None
    n_iter: int = 1
    lam: float = 0.0
    eps: float = 1e-7
    power: float = 0.5
    pair: str = "official"
    output: str = "official"
    tol: float = 1e-10

    needs: ClassVar[str] = "gram"

    def check(self) -> None:
        self.check_workers(None)

    def check_workers(self, p: int | None) -> None:
        _check_flag(
            p, self.m, self.n_iter, self.lam, self.eps, self.power, self.pair, self.output, self.tol
        )

    def fit(self, k: Tensor) -> tuple[Tensor, FlagInfo]:
        c, *info = FLAG_COEFFS(
            k, self.m, self.n_iter, float(self.lam), float(self.eps), float(self.power), self.pair,
            self.output, float(self.tol),
        )  # fmt: skip
        return c, FlagInfo(*info)

    def coeffs(self, geometry: Geometry, p: int) -> Tensor:
        return self.fit(geometry.gram)[0]


@public
def flag_aggregate(
    grads: Grads,
    m: int | None = None,
    *,
    n_iter: int = 1,
    lam: float = 0.0,
    eps: float = 1e-7,
    power: float = 0.5,
    pair: Literal["official", "objective"] = "official",
    output: Literal["official", "paper", "rescaled"] = "official",
    tol: float = 1e-10,
    nonfinite: Literal["drop", "raise"] = "drop",
    return_info: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor | list[Tensor], FlagInfo]:
    r"""Aggregate p workers' gradients with the Flag Aggregator: two reads of the rows, one write.

    ``combine(grads, flag_coeffs(gram(grads)))``: a subspace that explains most workers is fitted
    by iteratively reweighted least squares and their sum is projected onto it.

    Args:
        grads: tensor (p, ...), list of p tensors (...), or p lists of S parameters' gradients
            (read where they lie); float64, float32, bfloat16, float16.
        m, n_iter, lam, eps, power, pair, output, tol: see `flag_coeffs`. The official output has
            length at most p/m whatever the gradients' scale: retune the learning rate, or use
            ``output="rescaled"``. ``output="paper"`` is not bounded under attack.
        nonfinite: "drop" leaves out a worker with NaN or inf (or a squared norm beyond float64)
            and goes on with the others; "raise" raises instead, and reads one flag on the host.
        return_info: also return `FlagInfo`.

    Returns:
        The update (...), or a list of S tensors, in the dtype of `grads`; NaN if no worker is
        finite. The Gram matrix is summed as `gram(accum="fp32")`, the solve is float64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Gradients flow with the coefficients held fixed: :math:`dg_i = c_i\,du`.

    Source: Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses
    using Convex Optimization, arXiv 2302.05865; defaults of its published code.
    """
    rows = as_rows(grads)
    flag = _Flag(
        m=m, n_iter=n_iter, lam=lam, eps=eps, power=power, pair=pair, output=output, tol=tol,
        nonfinite=nonfinite,
    )  # fmt: skip
    flag.check_workers(rows.p)
    k = flag.measure(rows)
    flag.check_rows(k, rows.p)
    with torch.no_grad():
        c, info = flag.fit(k)
    update = flag.apply(grads, rows, c)
    return (update, info) if return_info else update


def _flag_aggregate_inputs(size, dtype, device, seed):
    return (random_grads(size, dtype, device, seed),)


def _flag_aggregate_floor(grads):
    """Two reads of the rows and one write of an update."""
    tensors, p = tensors_of(grads), len(grads)
    read = bytes_of(tensors)
    return 2 * read + read // p, (p * (p + 1) + 2 * p) * coordinates(tensors, p)


FLAG_AGGREGATE = chain(
    "flag_aggregate",
    flag_aggregate,
    (GRAM, FLAG_COEFFS, COMBINE),
    inputs=_flag_aggregate_inputs,
    floor=_flag_aggregate_floor,
    sizes={
        "test": [size for size in ROW_SIZES["test"] if size not in [(2, 0), (2, 1)]],
        "bench": ROW_SIZES["bench"],
    },
)
