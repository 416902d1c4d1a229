"""Byzantine attacks: what bad workers send, to test an aggregation rule with.

Every attack is a function ``attack(honest, f, **constants)``: it sees the honest workers' rows and
returns the rows of f Byzantine workers, in the form, dtype and on the device of `honest`:

    honest                       returned
    tensor (n, ...)              tensor (f, ...)
    list of n tensors            list of f tensors
    n lists of S tensors         f lists of S tensors

    rows = torch.cat([honest, attacks.alie(honest, 3)])
    update = dashpot.robust_aggregate(rows, "krum", f=3)

Means and deviations are taken in float32 at least. Random attacks take a `generator` and draw for
every Byzantine worker; the others send the same row from each (they collude). Attacks that work on
what the Byzantine worker would have sent honestly take these rows as `own`; left out, the honest
rows are used in turn. The defaults are the published constants; where two are in use both are
named. `flip_labels` works on data and not on gradients. Shapes: n honest workers, f Byzantine ones.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from dashpot.aggregate._rows import Grads, check_tensor

__all__ = [
    "alie", "alie_deviations", "bit_flip", "constant", "flip_labels", "gaussian",
    "inner_product_manipulation", "mimic", "reverse", "sign_flip", "uniform",
]  # fmt: skip


def _every_form(attack: Callable) -> Callable:
    """From an attack on one tensor (n, ...) to one on all three forms of `honest`, checked."""

    @functools.wraps(attack)
    def call(honest: Grads, f: int, **constants) -> Grads:
        columns, form = _columns(honest, "honest")
        if not isinstance(f, int) or isinstance(f, bool):
            raise TypeError(f"f: expected an int, got {type(f).__name__}")
        if f < 0:
            raise ValueError(f"f: expected at least 0, got {f}")
        own = constants.pop("own", None)
        if own is None:
            sent = [attack(column, f, **constants) for column in columns]
        else:
            owned, owned_form = _columns(own, "own")
            want, got = ([tuple(c.shape[1:]) for c in part] for part in (columns, owned))
            if owned_form != form or got != want or len(owned[0]) != f:
                raise ValueError(
                    f"own: expected the rows of f = {f} workers in the form and shapes of honest, "
                    f"{want}, got {len(owned[0])} of {got}"
                )
            pairs = zip(columns, owned, strict=True)
            sent = [attack(column, f, own=mine, **constants) for column, mine in pairs]
        if form == "tensor":
            return sent[0]
        if form == "list":
            return list(sent[0].unbind(0))
        return [list(row) for row in zip(*(one.unbind(0) for one in sent), strict=True)]

    return call


def _columns(rows: Grads, name: str) -> tuple[list[Tensor], str]:
    """The rows as one stacked tensor (n, ...) per parameter, and which form they came in."""
    if isinstance(rows, Tensor):
        check_tensor(rows, name)
        if rows.dim() == 0 or rows.shape[0] == 0:
            raise ValueError(f"{name}: expected at least one row (n, ...), got {tuple(rows.shape)}")
        return [rows], "tensor"
    if not isinstance(rows, list | tuple) or not rows:
        raise TypeError(
            f"{name}: expected a tensor (n, ...) or a list of at least one row, "
            f"got {type(rows).__name__}"
        )
    form = "lists" if isinstance(rows[0], list | tuple) else "list"
    parts = rows if form == "lists" else [[row] for row in rows]
    for i, row in enumerate(parts):
        if not isinstance(row, list | tuple) or len(row) != len(parts[0]):
            raise ValueError(f"{name}[{i}]: expected {len(parts[0])} tensors as in row 0")
        for tensor, first in zip(row, parts[0], strict=True):
            check_tensor(tensor, f"{name}[{i}]")
            if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"{name}[{i}]: expected {tuple(first.shape)} {first.dtype} as in row 0, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
    return [torch.stack(column) for column in zip(*parts, strict=True)], form


def _number(name: str, value, least: float = -math.inf) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least:g}, got {value:g}")


def _wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _from_each(row: Tensor, f: int, like: Tensor) -> Tensor:
    """The same row (...) from f workers: (f, ...)."""
    return row.to(like.dtype).expand(f, *row.shape).contiguous()


def _own_rows(honest: Tensor, f: int, own: Tensor | None) -> Tensor:
    """(f, ...): what the Byzantine workers would have sent."""
    if own is not None:
        return own
    return honest[torch.arange(f, device=honest.device) % honest.shape[0]]


# --------------------------------------------------------------------------------------------
# Of the honest rows


@_every_form
def sign_flip(honest: Grads, f: int) -> Grads:
    r"""The mean with its sign flipped, :math:`-\mu`.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them.
        f: how many Byzantine rows to make.

    Returns:
        (f, ...) equal rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Allen-Zhu et al. 2020 (arXiv 2012.14368), as in byzfl.
    """
    return _from_each(-_wide(honest).mean(0), f, honest)


@_every_form
def inner_product_manipulation(honest: Grads, f: int, *, scale: float = 0.1) -> Grads:
    r"""The mean scaled by a negative factor, :math:`-\epsilon\mu`: turns the sum against it.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them.
        f: how many Byzantine rows to make.
        scale: :math:`\epsilon \ge 0`; 0.1 in the Flag Aggregator's code, 2.0 in byzfl.

    Returns:
        (f, ...) equal rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Fall of Empires, Xie et al. 2020 (arXiv 1903.03936).
    """
    _number("scale", scale, 0)
    return _from_each(-scale * _wide(honest).mean(0), f, honest)


@_every_form
def alie(honest: Grads, f: int, *, deviations: float | None = -0.21) -> Grads:
    r"""A Little Is Enough: the mean, moved by a few standard deviations, :math:`\mu + z\sigma`.

    :math:`\sigma` is taken per coordinate with divisor n - 1. Small enough to hide among the honest
    rows, always in the same direction.

    Args:
        honest: (n, ...) rows of at least two honest workers, or a list of them.
        f: how many Byzantine rows to make.
        deviations: z. -0.21 in the Flag Aggregator's code (that is `alie_deviations(15, 3)`), +1.5
            in byzfl; None: ``-alie_deviations(n + f, f)``, the paper's.

    Returns:
        (f, ...) equal rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Baruch et al. 2019 (arXiv 1902.06156).
    """
    n = honest.shape[0]
    if n < 2:
        raise ValueError(f"honest: expected at least 2 rows for a standard deviation, got {n}")
    if deviations is None:
        deviations = -alie_deviations(n + f, f)
    _number("deviations", deviations)
    wide = _wide(honest)
    mean = wide.mean(0)
    sigma = ((wide - mean).square().sum(0) / (n - 1)).sqrt()
    return _from_each(mean + deviations * sigma, f, honest)


def alie_deviations(p: int, f: int) -> float:
    r"""The largest z for which a majority still supports the Byzantine row.

    With s = floor(p/2 + 1) - f honest workers needed for a majority, z is the quantile of the
    normal distribution at (p - f - s)/(p - f).

    Args:
        p: number of workers, Byzantine ones included.
        f: number of Byzantine ones, 1 <= f < p/2.

    Returns:
        z; 0.2104 for p = 15, f = 3.

    Raises:
        ValueError: f outside its range.

    Source: Baruch et al. 2019 (arXiv 1902.06156).
    """
    if not 1 <= f < p / 2:
        raise ValueError(f"f: expected 1 <= f < p/2 for p = {p}, got {f}")
    supporters = p // 2 + 1 - f
    return statistics.NormalDist().inv_cdf((p - f - supporters) / (p - f))


@_every_form
def mimic(honest: Grads, f: int, *, worker: int = 0) -> Grads:
    r"""A copy of one honest worker's row: over-represents it where workers' data differ.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them.
        f: how many Byzantine rows to make.
        worker: which one is copied, 0 <= worker < n (byzfl: 0).

    Returns:
        (f, ...) equal rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Karimireddy et al. 2022 (arXiv 2006.09365).
    """
    if not isinstance(worker, int) or not 0 <= worker < honest.shape[0]:
        raise ValueError(f"worker: expected 0 <= worker < n = {honest.shape[0]}, got {worker!r}")
    return _from_each(honest[worker], f, honest)


# --------------------------------------------------------------------------------------------
# Of the Byzantine worker's own row


@_every_form
def reverse(honest: Grads, f: int, *, scale: float = 10.0, own: Grads | None = None) -> Grads:
    r"""The worker's own row, turned round and amplified: :math:`-10 g_i`.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them.
        f: how many Byzantine rows to make.
        scale: the factor, >= 0 (the Flag Aggregator's code: 10).
        own: (f, ...) what the Byzantine workers would have sent; left out: honest rows in turn.

    Returns:
        (f, ...) rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: the attack "reverse" of Garfield and of the Flag Aggregator's code.
    """
    _number("scale", scale, 0)
    return (-scale * _wide(_own_rows(honest, f, own))).to(honest.dtype)


# An integer of the same width, the exponent's lowest bit and the sign's.
_LAYOUT = {
    torch.float64: (torch.int64, 52, 63),
    torch.float32: (torch.int32, 23, 31),
    torch.bfloat16: (torch.int16, 7, 15),
    torch.float16: (torch.int16, 10, 15),
}


@_every_form
def bit_flip(
    honest: Grads,
    f: int,
    *,
    bit: int | None = None,
    fraction: float = 1.0,
    generator: torch.Generator | None = None,
    own: Grads | None = None,
) -> Grads:
    r"""One bit of the exponent of the worker's own numbers, flipped: a fault of the hardware.

    The highest bit turns what lies below 2 in absolute value into something huge (float32: times
    2^128; 0 becomes 2; from 1 to 2 inf or NaN) and what lies above into almost 0.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them.
        f: how many Byzantine rows to make.
        bit: which bit of the exponent, 0 for the lowest; None: the highest.
        fraction: of the coordinates that are hit, drawn one by one, in [0, 1].
        generator: of those draws; not read where fraction is 1.
        own: (f, ...) what the Byzantine workers would have sent; left out: honest rows in turn.

    Returns:
        (f, ...) rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    integer, low, high = _LAYOUT[honest.dtype]
    bit = high - low - 1 if bit is None else bit
    if not isinstance(bit, int) or not 0 <= bit < high - low:
        raise ValueError(f"bit: expected 0 <= bit < {high - low} in {honest.dtype}, got {bit!r}")
    _number("fraction", fraction, 0)
    if fraction > 1:
        raise ValueError(f"fraction: expected at most 1, got {fraction:g}")
    rows = _own_rows(honest, f, own)
    flipped = (rows.contiguous().view(integer) ^ (1 << (low + bit))).view(honest.dtype)
    if fraction == 1:
        return flipped
    drawn = torch.rand(rows.shape, generator=generator, device=honest.device)
    return torch.where(drawn < fraction, flipped, rows)


# --------------------------------------------------------------------------------------------
# Of nothing but the shape


@_every_form
def constant(honest: Grads, f: int, *, value: float = 1e6) -> Grads:
    r"""One number everywhere, `math.inf` and `math.nan` among those allowed.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them; only their shape counts.
        f: how many Byzantine rows to make.
        value: the number (byzfl's Inf: infinity). What exceeds the dtype becomes inf.

    Returns:
        (f, ...) equal rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"value: expected a number, got {type(value).__name__}")
    wide = torch.full(honest.shape[1:], value, dtype=torch.float64, device=honest.device)
    return _from_each(wide, f, honest)


@_every_form
def uniform(
    honest: Grads,
    f: int,
    *,
    low: float = 0.0,
    high: float = 1.0,
    generator: torch.Generator | None = None,
) -> Grads:
    r"""Numbers drawn evenly from [low, high), rounded to the rows' dtype.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them; only their shape counts.
        f: how many Byzantine rows to make.
        low, high: the interval (the Flag Aggregator's code: 0 and 1).
        generator: of the draws, on the device of `honest`.

    Returns:
        (f, ...) rows, drawn apart.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _number("low", low)
    _number("high", high, low)
    wide = _wide(honest)
    rows = torch.rand(
        (f, *honest.shape[1:]), generator=generator, dtype=wide.dtype, device=honest.device
    )
    return (low + (high - low) * rows).to(honest.dtype)


@_every_form
def gaussian(
    honest: Grads,
    f: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Grads:
    r"""Normal noise, :math:`N(mean, std^2)` in every coordinate.

    Args:
        honest: (n, ...) rows of the honest workers, or a list of them; only their shape counts.
        f: how many Byzantine rows to make.
        mean, std: of the noise (byzfl: 0 and 1), std >= 0.
        generator: of the draws, on the device of `honest`.

    Returns:
        (f, ...) rows, drawn apart.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _number("mean", mean)
    _number("std", std, 0)
    wide = _wide(honest)
    rows = torch.randn(
        (f, *honest.shape[1:]), generator=generator, dtype=wide.dtype, device=honest.device
    )
    return (mean + std * rows).to(honest.dtype)


# --------------------------------------------------------------------------------------------
# Of the data


def flip_labels(labels: Tensor, classes: int) -> Tensor:
    r"""Class c becomes classes - 1 - c: the Byzantine worker learns the opposite, and honestly so.

    Args:
        labels: (n, ...) integers in [0, classes).
        classes: how many there are, at least 1.

    Returns:
        (n, ...) of the same dtype.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected a tensor of integers, got {got}")
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes: expected an int of at least 1, got {classes!r}")
    if labels.numel() and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels: expected 0 <= label < classes = {classes}, "
            f"got {labels.min().item()} to {labels.max().item()}"
        )
    return classes - 1 - labels
