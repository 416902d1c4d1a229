"""The op `opis`: how much the operating points of an embedding's classes differ."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._grouped import grouped_rows
from dashpot.contrastive._pairs import (
    bytes_of,
    check_bool,
    check_choice,
    check_integers,
    check_number,
    check_rows,
    unit_rows,
)


class OpisCurves(NamedTuple):
    """The curves that `opis` compares.

    thresholds: (T,) float64 distances. classes: (C,) int64, labels of the classes with at least
    two rows, ascending. utility: (C, T) float64, U_c at each threshold.
    """

    thresholds: Tensor
    classes: Tensor
    utility: Tensor


def distance_of(s: Tensor, euclidean: bool) -> Tensor:
    """The distance of unit rows whose cosine is s."""
    return (2 - 2 * s).clamp(min=0).sqrt() if euclidean else 1 - s


def grid_of(
    ends: Tensor, num_thresholds: int, euclidean: bool, exact: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The distances (T,) from ends[0] to ends[1], and the cosines at which they are reached (T,).

    exact: (2,) cosines of the ends where they are known: a pair that lies on an end counts."""
    steps = torch.arange(num_thresholds, dtype=torch.float64, device=ends.device)
    grid = ends[0] + steps * ((ends[1] - ends[0]) / (num_thresholds - 1))  # (T,)
    cosines = 1 - grid.square() / 2 if euclidean else 1 - grid
    if exact is not None:
        grid = torch.where(steps == num_thresholds - 1, ends[1], grid)
        cosines = torch.where(steps == 0, exact[0], cosines)
        cosines = torch.where(steps == num_thresholds - 1, exact[1], cosines)
    return grid, cosines


def _opis_reference(
    embeddings: Tensor, classes: Tensor, num_classes: int, d_range: list[float],
    ranks: list[int], num_thresholds: int, euclidean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """genuine[c, k], impostor[c, k] (C, T) int64: unordered pairs inside class c, and with exactly
    one row in c, at a distance <= grid[k] (T,) float64. classes: (N,) 0..C-1, or C for rows that
    count as impostors of others only.

    The grid goes over d_range or, if that is empty, from the ranks[0]-th to the ranks[1]-th
    smallest impostor distance (from 1).
    """
    u = unit_rows(embeddings.detach())  # (N, D)
    n = u.shape[0]
    first, second = torch.triu_indices(n, n, 1, device=u.device)  # (P,) each
    s = (u @ u.mT)[first, second].double()  # (P,)
    alike = classes[first] == classes[second]
    alike = alike & (classes[first] < num_classes)
    exact = None
    if d_range:
        ends = torch.tensor(d_range, dtype=torch.float64, device=u.device)
    else:
        ordered = torch.where(alike, -torch.inf, s).sort(descending=True).values
        exact = torch.stack([ordered[rank - 1] for rank in ranks])  # (2,)
        ends = distance_of(exact, euclidean)
    grid, cosines = grid_of(ends, num_thresholds, euclidean, exact)
    # The first threshold that a pair is within, T if none: cosines descend.
    place = torch.searchsorted(-cosines, -s)  # (P,)

    def curve(ids: Tensor, live: Tensor) -> Tensor:
        width = num_thresholds + 1
        at = torch.where(live & (ids < num_classes), ids * width + place, num_classes * width)
        flat = torch.zeros(num_classes * width + 1, dtype=torch.int64, device=u.device)
        flat = flat.index_add(0, at, torch.ones_like(at))[:-1]
        return flat.reshape(num_classes, width)[:, :-1].cumsum(1)

    genuine = curve(classes[first], alike)
    impostor = curve(classes[first], ~alike) + curve(classes[second], ~alike)
    return genuine, impostor, grid


def _opis_fake(embeddings, classes, num_classes, d_range, ranks, num_thresholds, euclidean):
    counts = classes.new_empty((num_classes, num_thresholds))
    grid = embeddings.new_empty((num_thresholds,), dtype=torch.float64)
    return counts, torch.empty_like(counts), grid


def _dense(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Classes of at least two rows, ascending (C,); their rows (C,); the class of each row (N,), C
    for the rows of the others; and how many unordered impostor pairs there are. Waits for the
    device: the number of classes is a shape."""
    values, place, counts = labels.unique(return_inverse=True, return_counts=True)
    kept = counts > 1
    rank = torch.where(kept, kept.cumsum(0) - 1, kept.sum())
    n = labels.shape[0]
    impostors = (n * n - int(counts.square().sum())) // 2 if n else 0
    return values[kept], counts[kept], rank[place], impostors


def _ranks(far_range: tuple[float, float], impostors: int) -> list[int]:
    """The least counts k with k / impostors >= the false acceptance rates."""
    ranks = []
    for rate in far_range:
        k = max(1, math.ceil(rate * impostors))
        ranks.append(k - 1 if k > 1 and (k - 1) / impostors >= rate else k)
    return ranks


def _opis_inputs(size, dtype, device, seed):
    """Odd sizes find their range, even ones are given it. With "signs" first: coordinates of one
    size, as many as make cosines exact in every dtype, so that counts of millions of pairs can be
    compared; and the default thresholds."""
    n, d = size[-2:]
    embeddings, _ = grouped_rows((n, d), dtype, device, seed)
    _, labels = grouped_rows((n, d), dtype, device, 0)  # their number of classes is an argument
    values, _, classes, impostors = _dense(labels)
    if size[0] == "signs":
        live = torch.arange(d, device=device) < 4 ** int(math.log(d, 4))
        embeddings = torch.where(live, torch.where(embeddings > 0, 1.0, -1.0), 0.0).to(dtype)
        d_range, ranks = ([], _ranks((0.01, 0.1), impostors)) if n % 2 else ([0.9, 1.3], [])
        return embeddings, classes, values.shape[0], d_range, ranks, 101, True
    d_range, ranks = ([], _ranks((0.05, 0.4), impostors)) if n % 2 else ([0.9, 1.3], [])
    return embeddings, classes, values.shape[0], d_range, ranks, 11 + n % 7, n % 3 > 0


def _opis_floor(embeddings, classes, num_classes, d_range, ranks, num_thresholds, euclidean):
    """One read of the rows, two tables of counts; a multiply-add per unordered pair and
    coordinate."""
    n, d = embeddings.shape
    return bytes_of(embeddings, classes) + 16 * num_classes * num_thresholds, n * n * d


OPIS = declare(
    "opis",
    forward="(Tensor embeddings, Tensor classes, int num_classes, float[] d_range, int[] ranks,"
    " int num_thresholds, bool euclidean) -> (Tensor genuine, Tensor impostor, Tensor grid)",
    reference=_opis_reference,
    fake=_opis_fake,
    inputs=_opis_inputs,
    floor=_opis_floor,
    sizes={
        # a pair and a stranger; below, at and above panels of 64 rows; many equal distances
        "test": [(7, 5), (33, 16), (64, 16), (130, 17), (257, 17), ("signs", 151, 20)],
        "bench": [("signs", 1000, 128), ("signs", 10_000, 128)],
    },
)


@public
def opis(
    embeddings: Tensor,
    labels: Tensor,
    *,
    d_range: tuple[float, float] | None = None,
    far_range: tuple[float, float] = (1e-2, 1e-1),
    num_thresholds: int = 101,
    beta: float = 1.0,
    metric: Literal["euclidean", "cosine"] = "euclidean",
    return_curves: bool = False,
) -> Tensor | tuple[Tensor, OpisCurves]:
    r"""Operating-point inconsistency score: the variance of the classes' utility curves.

    For class c, :math:`\phi_c(d)` is the share of its impostor pairs (one row in c) further apart
    than d, :math:`\psi_c(d)` the share of its genuine pairs within d, and

    .. math:: U_c = \frac{(1 + \beta^2)\, \phi_c \psi_c}{\beta^2 \phi_c + \psi_c}, \qquad
              OPIS = \frac{1}{C (d_1 - d_0)} \sum_c \int_{d_0}^{d_1} (U_c - \bar U)^2\, dd,

    by the trapezoid rule on a grid of thresholds, at which the curves are exact. The N x N matrix
    is never stored. An evaluation: no gradient, and the host waits for the device.

    Args:
        embeddings: (N, D) rows of any length; float64, float32, bfloat16 or float16.
        labels: (N,) integers. Classes of one row have no curve; their pairs are impostors.
        d_range: (d0, d1), d0 < d1. Default: the smallest impostor distances at which the pooled
            false acceptance rate reaches `far_range`.
        far_range: two rates, 0 < low < high <= 1; used where `d_range` is None.
        num_thresholds: points of the grid, at least 2.
        beta: weight of psi, > 0: U tends to phi for beta to 0 and to psi for beta to infinity.
        metric: "euclidean" distance of unit rows, or "cosine", 1 - cos.
        return_curves: also return `OpisCurves`.

    Returns:
        The score () float64, NaN if a row is not finite; with `return_curves` (score,
        `OpisCurves`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; no class with
        two rows, or fewer than two classes.

    Source: the score of arXiv 2307.04047, reconstructed from public summaries; grid, metric and
    rates are this library's choice. The paper's percentile variant is not defined here.
    """
    check_rows(embeddings, "embeddings")
    n = embeddings.shape[0]
    labels = check_integers(labels, "labels", n, embeddings.device)
    far_range = _interval(far_range, "far_range")
    if far_range[0] <= 0 or far_range[1] > 1:
        raise ValueError(f"far_range: expected 0 < low < high <= 1, got {far_range}")
    d_range = None if d_range is None else _interval(d_range, "d_range")
    if not isinstance(num_thresholds, int) or isinstance(num_thresholds, bool):
        raise TypeError(f"num_thresholds: expected an int, got {type(num_thresholds).__name__}")
    if num_thresholds < 2:
        raise ValueError(f"num_thresholds: expected at least 2, got {num_thresholds}")
    beta = check_number(beta, "beta")
    check_choice("metric", metric, ("euclidean", "cosine"))
    check_bool("return_curves", return_curves)
    values, counts, classes, impostors = _dense(labels)
    if values.numel() == 0 or impostors == 0:
        raise ValueError("labels: expected two classes, and two rows in one of them")
    genuine, impostor, grid = OPIS(
        embeddings.contiguous(), classes, values.shape[0],
        [] if d_range is None else list(d_range),
        _ranks(far_range, impostors) if d_range is None else [], num_thresholds,
        metric == "euclidean",
    )  # fmt: skip
    inside, across = counts * (counts - 1) // 2, counts * (n - counts)  # (C,)
    psi = genuine / inside[:, None].double()  # (C, T)
    phi = 1 - impostor / across[:, None].double()
    bottom = beta**2 * phi + psi
    utility = torch.where(bottom > 0, (1 + beta**2) * phi * psi / bottom.where(bottom > 0, 1), 0)
    spread = (utility - utility.mean(0)).square().mean(0)  # (T,)
    score = (spread.sum() - (spread[0] + spread[-1]) / 2) / (num_thresholds - 1)
    finite = embeddings.detach().isfinite().all()
    score = torch.where(finite, score, torch.nan)
    return (score, OpisCurves(grid, values, utility)) if return_curves else score


def _interval(value, name: str) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name}: expected two floats, got {value!r}")
    low, high = (check_number(one, name, least=-math.inf, strict=False) for one in value)
    if low >= high:
        raise ValueError(f"{name}: expected low < high, got {value}")
    return low, high
