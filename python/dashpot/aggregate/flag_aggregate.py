"""`flag_aggregate`: gram, flag_coeffs and combine in a chain."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._rows import (
    ROW_SIZES,
    Grads,
    as_rows,
    bytes_of,
    check_choice,
    coordinates,
    random_rows,
    total,
)
from dashpot.aggregate.combine import COMBINE, _combine
from dashpot.aggregate.flag_coeffs import FLAG_COEFFS, FlagInfo, _check_flag
from dashpot.aggregate.gram import GRAM


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
    _check_flag(rows.p, m, n_iter, lam, eps, power, pair, output, tol)
    check_choice("nonfinite", nonfinite, ("drop", "raise"))
    with torch.no_grad():
        k = total([GRAM(group, None, rows.p, "fp32") for group in rows.groups])
        if nonfinite == "raise":
            _check_finite(k)
        c, *info = FLAG_COEFFS(
            k, m, n_iter, float(lam), float(eps), float(power), pair, output, float(tol)
        )
    update = _combine(grads, rows, c, None)
    return (update, FlagInfo(*info)) if return_info else update


def _check_finite(k: Tensor) -> None:
    bad = (~torch.isfinite(k.diagonal())).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"grads: expected finite rows, got NaN or inf from workers {bad}")


def _flag_aggregate_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    return ([grads[i::p] for i in range(p)] if size[0] == "lists" else grads[0],)


def _flag_aggregate_floor(grads):
    """Two reads of the rows and one write of an update."""
    tensors = [grads] if isinstance(grads, Tensor) else [t for row in grads for t in row]
    p, read = len(grads), bytes_of(tensors)
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
