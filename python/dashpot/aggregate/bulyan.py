"""`bulyan`: pairwise_sqdist, bulyan_rows and coordinate_rules in a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.aggregate._rows import (
    ROW_SIZES,
    Grads,
    as_rows,
    bytes_of,
    coordinates,
    random_rows,
    total,
)
from dashpot.aggregate.bulyan_rows import BULYAN_ROWS, check_bulyan
from dashpot.aggregate.coordinate_rules import COORDINATE_RULES, one_rule
from dashpot.aggregate.pairwise_sqdist import PAIRWISE_SQDIST


@public
def bulyan(
    grads: Grads, f: int, *, out: Tensor | list[Tensor] | None = None
) -> Tensor | list[Tensor]:
    r"""Bulyan: p - 2 f rows chosen by repeated Krum, then, in each coordinate, the mean of the
    p - 4 f values nearest their median. Two reads of the rows, one write.

    Args:
        grads: tensor (p, ...), list of p tensors, or p lists of S tensors, as in
            `coordinate_rules`, which says how ties, NaN and inf count among the chosen rows.
        f: workers that may be bad, f >= 0 and p >= 4 f + 3. A row with NaN or inf has no finite
            distance and is not chosen while others remain (`bulyan_rows`).
        out: where to write: a contiguous tensor, or S of them for parameter lists, of one
            worker's shapes, dtype and device; no gradient flows through it.

    Returns:
        The mean (...), or a list of S tensors, in the dtype of `grads`; sums in float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: `out` given while a gradient is wanted.

    Gradients flow with the choice of rows held fixed.

    Source: The Hidden Vulnerability of Distributed Learning in Byzantium, arXiv 1802.07927.
    """
    rows = as_rows(grads)
    check_bulyan(f, rows.p)
    with torch.no_grad():
        sqdist = total([PAIRWISE_SQDIST(group, None, rows.p, False) for group in rows.groups])
        chosen = BULYAN_ROWS(sqdist, f)
    return spread_mean(grads, chosen, f, out=out, rows=rows)


def spread_mean(grads: Grads, chosen: Tensor, f: int, *, out=None, rows=None):
    """Bulyan's second stage: of the p - 2 f rows chosen (p,) bool, the mean of the p - 4 f values
    nearest their median, which is `meamed` among them with 2 f left out."""
    rows = as_rows(grads) if rows is None else rows
    return one_rule(grads, "meamed", 2 * f, mask=chosen, count=rows.p - 2 * f, out=out, rows=rows)


def _bulyan_inputs(size, dtype, device, seed):
    grads, p = random_rows(size, dtype, device, seed)
    return [grads[i::p] for i in range(p)] if size[0] == "lists" else grads[0], (p - 3) // 4


def _bulyan_floor(grads, f):
    """One read of all rows, one of those chosen, one write; the operations of pairwise_sqdist."""
    tensors = [grads] if isinstance(grads, Tensor) else [t for row in grads for t in row]
    p, read = len(grads), bytes_of(tensors)
    return (2 * p - 2 * f + 1) * (read // p), 3 * p * (p - 1) // 2 * coordinates(tensors, p)


BULYAN = chain(
    "bulyan",
    bulyan,
    (PAIRWISE_SQDIST, BULYAN_ROWS, COORDINATE_RULES),
    inputs=_bulyan_inputs,
    floor=_bulyan_floor,
    sizes={
        # The largest is one tensor: a list has gradients of 0 for the rows that were not chosen.
        "test": [(3, 17), (7, 64), (15, 300), (33, 140), ("lists", 7, 33, 5, 600)],
        "bench": ROW_SIZES["bench"],
    },
)
