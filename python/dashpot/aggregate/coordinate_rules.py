"""The op `coordinate_rules`: rules that sort the workers' values of each coordinate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import Chain, chain, declare
from dashpot.aggregate._rows import (
    CHUNK,
    ROW_SIZES,
    Grads,
    Rows,
    as_rows,
    bytes_of,
    check_mask,
    coordinates,
    random_rows,
    segments,
    spread,
)
from dashpot.aggregate.combine import _check_out

RULES = ("median", "lower_median", "trimmed_mean", "meamed", "phocas")


def _taking_part(mask: Tensor, count: int) -> Tensor:
    """Indices (count,) of the rows with mask True, in order."""
    return mask.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _center(wide: Tensor, f: int, rule: str) -> Tensor:
    """What the values' distances are measured from: wide (count, n) float64, sorted -> (n,)."""
    count = wide.shape[0]
    if rule == "meamed":
        return 0.5 * wide[(count - 1) // 2] + 0.5 * wide[count // 2]
    return sum(wide[f : count - f].unbind(0)) / (count - 2 * f)


def _window(x: Tensor, f: int, rule: str) -> tuple[Tensor, Tensor]:
    """The count - f values nearest the centre are neighbours in sorted order: where they start.

    The window moves up while the value above it is nearer than its lowest one. x (count, n) sorted
    -> start (n,) int64, center (n,) float64. Comparisons are made in float64.
    """
    wide = x.detach().double()
    center = _center(wide, f, rule)
    low, high = wide[:f], wide[x.shape[0] - f :]  # (f, n) each, a pair per step of the window
    nearer = 0.5 * low + 0.5 * high < center
    nearer = nearer | ((high == center) & (low < center))  # an infinite centre
    return nearer.sum(0), center


def _apply_rule(x: Tensor, f: int, rule: str) -> Tensor:
    """x (count, n) sorted, NaN last -> (n,)."""
    count = x.shape[0]
    if rule in ("median", "lower_median"):
        low, high = x[(count - 1) // 2], x[count // 2]
        return low if rule == "lower_median" or count % 2 else 0.5 * (low + high)
    if rule == "trimmed_mean":
        return x[f : count - f].sum(0) / (count - 2 * f)
    start, center = _window(x, f, rule)
    places = start + torch.arange(count - f, device=x.device)[:, None]  # (count - f, n)
    return torch.where(center.isnan(), torch.nan, x.gather(0, places).sum(0) / (count - f))


def _coordinate_rules_reference(
    grads: list[Tensor], mask: Tensor | None, p: int, count: int, f: int, rules: list[str]
) -> list[Tensor]:
    """Sort each coordinate's `count` values, NaN last; each rule takes some of them.

    Output r * S + s is rule r of segment s, (n_s,). NaN where mask has not `count` True entries.
    """
    columns = []
    for rows in segments(grads, p):  # (p, n)
        if mask is not None:
            rows = rows[_taking_part(mask, count)]  # (count, n)
        parts = []
        for part in rows.split(CHUNK, dim=1):
            x = part if part.dtype == torch.float64 else part.float()
            x = x.sort(dim=0, stable=True).values
            parts.append(torch.stack([_apply_rule(x, f, rule) for rule in rules]))
        out = torch.cat(parts, dim=1).to(rows.dtype)  # (R, n)
        columns.append(out if mask is None else torch.where(mask.sum() == count, out, torch.nan))
    return [column[r].clone() for r in range(len(rules)) for column in columns]


def _weights(x: Tensor, f: int, rule: str) -> Tensor:
    """d rule / d sorted value: (count, n), or (count, 1) where it is the same everywhere."""
    count = x.shape[0]
    place = torch.arange(count, device=x.device)[:, None]  # (count, 1)
    if rule in ("median", "lower_median"):
        low = place == (count - 1) // 2
        high = low if rule == "lower_median" else place == count // 2
        return 0.5 * low + 0.5 * high
    if rule == "trimmed_mean":
        return ((place >= f) & (place < count - f)).double() / (count - 2 * f)
    start, _ = _window(x, f, rule)
    return ((place >= start) & (place < start + (count - f))).double() / (count - f)


def _coordinate_rules_backward(
    grad_outputs: list[Tensor], grads: list[Tensor], mask: Tensor | None, p: int, count: int,
    f: int, rules: list[str],
) -> list[Tensor]:  # fmt: skip
    """Each value that a rule takes the mean of gets its share of the gradient; of equal values the
    one of the first worker counts as the lowest."""
    matrices = segments(grads, p)
    spreads = []
    for s, rows in enumerate(matrices):  # (p, n)
        chosen = None if mask is None else _taking_part(mask, count)
        live = rows.detach() if chosen is None else rows.detach()[chosen]  # (count, n)
        x = live if live.dtype == torch.float64 else live.float()
        x, order = x.sort(dim=0, stable=True)
        share = torch.zeros_like(x)
        for r, rule in enumerate(rules):
            du = grad_outputs[r * len(matrices) + s].to(x.dtype)  # (n,)
            share = share + _weights(x, f, rule).to(x.dtype) * du
        grad = torch.zeros_like(share).scatter(0, order, share)  # (count, n), by worker
        if chosen is not None:
            grad = grad.new_zeros(rows.shape).index_copy(0, chosen, grad)
        spreads.append(grad.to(rows.dtype))
    return spread(spreads, grads, p)


def _coordinate_rules_fake(grads: list[Tensor], mask, p: int, count, f, rules) -> list[Tensor]:
    if len(grads) == 1:
        lengths = [grads[0].numel() // p]
    else:
        lengths = [grads[s].numel() for s in range(0, len(grads), p)]
    return [grads[0].new_empty((n,)) for _ in rules for n in lengths]


def _coordinate_rules_inputs(size, dtype, device, seed):
    """All rules; the usual two at the sizes of the benchmark; windows of less than half of the
    workers at p = 16; some rows left out at p = 5 and in the second list."""
    grads, p = random_rows(size, dtype, device, seed)
    f, rules, mask, count = max((p - 1) // 4, int(p > 2)), list(RULES), None, p
    if p == 16:
        f, rules = 11, ["meamed"]
    elif p == 5:
        mask, count = torch.arange(p, device=device) != 1, 4
    elif size[:2] == ("lists", 15):
        mask, count = torch.arange(p, device=device) % 5 > 1, 9
        f, rules = 6, ["meamed", "median"]
    elif p in (7, 15, 60):
        rules = ["median", "trimmed_mean"]
    return grads, mask, p, count, f, rules


def _coordinate_rules_floor(grads, _mask, p, count, _f, rules):
    """One read of the rows that take part and of which they are, one write per rule; a comparison
    (a minimum and a maximum) for each of the log2(count!) bits that sorting needs."""
    row = bytes_of(grads) // p
    bits = sum(torch.log2(torch.arange(1, count + 1).double())).item()
    return (count + len(rules)) * row + p, int(2 * bits) * coordinates(grads, p)


COORDINATE_RULES = declare(
    "coordinate_rules",
    forward="(Tensor[] grads, Tensor? mask, int p, int count, int f, str[] rules)"
    " -> (Tensor[] outputs)",
    backward="(Tensor[] grad_outputs, Tensor[] grads, Tensor? mask, int p, int count, int f,"
    " str[] rules) -> (Tensor[] grad_grads)",
    reference=_coordinate_rules_reference,
    reference_backward=_coordinate_rules_backward,
    fake=_coordinate_rules_fake,
    inputs=_coordinate_rules_inputs,
    floor=_coordinate_rules_floor,
    sizes=ROW_SIZES,
)


@public
def coordinate_rules(
    grads: Grads,
    f: int,
    rules: Sequence[Literal["median", "lower_median", "trimmed_mean", "meamed", "phocas"]] = (
        "median",
        "trimmed_mean",
    ),
    *,
    mask: Tensor | None = None,
    count: int | None = None,
) -> dict[str, Tensor | list[Tensor]]:
    r"""Several coordinate-wise rules in one read of the rows: each coordinate's p values are sorted
    once, :math:`x_0 \le \dots \le x_{p-1}`, and each rule takes the mean of some of them.

    =============== ==========================================================================
    median          :math:`x_{(p-1)/2}`, or the mean of the middle two if p is even
    lower_median    the lower of the middle two (`torch.median`)
    trimmed_mean    mean of :math:`x_f \dots x_{p-f-1}`
    meamed          mean of the p - f values nearest the median
    phocas          mean of the p - f values nearest the trimmed mean
    =============== ==========================================================================

    Of two values at the same distance the lower one counts as nearer. NaN sorts last, as in
    `torch.sort`, and counts as furthest away; a result is NaN only if a NaN is among the values
    that the rule takes the mean of, or determines the centre. Infinities are ordinary extreme
    values, at distance 0 from an equal centre; the mean of both infinities is NaN.

    Args:
        grads: tensor (p, ...), list of p tensors (...), or p lists of S tensors (read where they
            lie); float64, float32, bfloat16, float16.
        f: workers that may be bad, 0 <= 2 f < p.
        rules: names of the table, without repetition.
        mask: (p,) bool; rows with False take no part, and p above is `count`.
        count: how many entries of mask are True, which is not read from the device; default p.
            Every result is NaN if the mask has another number of them.

    Returns:
        {rule: update}, an update (...) or a list of S tensors, in the dtype of `grads`; sums in
        float32 at least.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Differentiable twice: each value that a rule takes the mean of gets an equal share of the
    gradient (of equal values the first worker's counts as the lowest); the second derivative is 0.
    """
    rows = as_rows(grads)
    mask = check_mask(mask, rows)
    count = _check_count(count, mask, rows.p)
    check_f(f, count)
    rules = _check_rules(rules)
    groups = [COORDINATE_RULES(group, mask, rows.p, count, f, rules) for group in rows.groups]
    return {rule: _rebuild(rows, grads, groups, r) for r, rule in enumerate(rules)}


def _rebuild(rows: Rows, grads: Grads, groups: list[list[Tensor]], rule: int):
    """Rule number `rule` of the groups' outputs, in the shape of one worker."""
    parts = [
        outs[rule * len(order) : (rule + 1) * len(order)]
        for outs, order in zip(groups, rows.order, strict=True)
    ]
    return rows.rebuild(parts, grads)


def one_rule(grads: Grads, rule: str, f: int, *, mask=None, count=None, out=None, rows=None):
    """A single rule, checked arguments in, an update out; what the rules' own functions call."""
    rows = as_rows(grads) if rows is None else rows
    count = rows.p if count is None else count
    args = (mask, rows.p, count, f, [rule])
    if out is None:
        groups = [COORDINATE_RULES(group, *args) for group in rows.groups]
        return _rebuild(rows, grads, groups, 0)
    like = grads[0] if rows.form == "lists" else [grads[0]]
    targets = out if rows.form == "lists" else [out]
    _check_out(targets, like)
    for group, order in zip(rows.groups, rows.order, strict=True):
        COORDINATE_RULES.into([targets[s].view(-1) for s in order], group, *args)
    return out


def trimming_rule(grads: Grads, rule: str, f: int, out=None):
    """A single rule that leaves out f workers' values, f as the user gave it."""
    rows = as_rows(grads)
    check_f(f, rows.p)
    return one_rule(grads, rule, f, out=out, rows=rows)


def check_f(f, p: int) -> None:
    """0 <= 2 f < p."""
    if not isinstance(f, int) or isinstance(f, bool):
        raise TypeError(f"f: expected an int, got {type(f).__name__}")
    if f < 0 or 2 * f >= p:
        raise ValueError(f"f: expected 0 <= 2 f < p = {p}, got {f}")


def _check_count(count, mask: Tensor | None, p: int) -> int:
    if count is None:
        return p
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count: expected an int or None, got {type(count).__name__}")
    if mask is None and count != p:
        raise ValueError(f"count: expected p = {p} without a mask, got {count}")
    if not 1 <= count <= p:
        raise ValueError(f"count: expected 1 <= count <= p = {p}, got {count}")
    return count


def _check_rules(rules) -> list[str]:
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        raise TypeError(f"rules: expected a sequence of names, got {type(rules).__name__}")
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"rules: expected some of {', '.join(RULES)}, got {rule!r}")
    if not rules or len(set(rules)) < len(rules):
        raise ValueError(f"rules: expected at least one, each once, got {list(rules)}")
    return list(rules)


def rule_inputs(size, dtype, device, seed):
    """(grads, f) for the tests of a single rule."""
    grads, p = random_rows(size, dtype, device, seed)
    listed = [grads[i::p] for i in range(p)] if size[0] == "lists" else grads[0]
    return listed, max((p - 1) // 4, int(p > 2))


def rule_floor(grads, _f=None):
    """One read of the rows, one write; sorting's comparisons as in `_coordinate_rules_floor`."""
    tensors = [grads] if isinstance(grads, Tensor) else [t for row in grads for t in row]
    return _coordinate_rules_floor(tensors, None, len(grads), len(grads), 0, [""])


# One coordinate; a SIMD width and a tail; more workers than registers; lists (of several
# coordinates each: a single mean may be nearly 0, and its error is measured by its size).
RULE_SIZES = {
    "test": [(2, 1), (5, 64), (15, 300), (33, 140), ("lists", 7, 33, 5, 600)],
    "bench": ROW_SIZES["bench"],
}


def rule_chain(function: Callable, inputs: Callable = rule_inputs) -> Chain:
    """The function of a single rule, in the registry under its name."""
    return chain(
        function.__name__,
        function,
        (COORDINATE_RULES,),
        inputs=inputs,
        floor=rule_floor,
        sizes=RULE_SIZES,
    )
