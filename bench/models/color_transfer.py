"""python -m bench.models.color_transfer [--json FILE] [--picture FILE] [--k 1 2 4 ...]: the colours
of one photograph given to another by transport with at most k nonzeros per column.

Re-enacts the paper's run (arXiv 2209.15466) on scikit-learn's two sample photographs, china.jpg and
flower.jpg. Each is reduced to 256 colours by k-means; the cost is the squared distance of colours,
the masses are how often they occur, gamma is 1 and k runs from 1 to 128. A colour of the source
becomes the mean of the target's colours, weighted by its row of the plan (a row without mass keeps
its colour).

Contenders: dashpot's semi-dual by its own choice of solver (auto) and by L-BFGS, and POT's
smooth_ot_semi_dual, all float64, stop 1e-9, one thread; POT's 500 iterations, ours up to 2000, for
the question is the time to the same or a better value. What is printed: the semi-dual's value
(higher is better), nonzeros, the L1 error of the rows, and milliseconds (medians).
"""

from __future__ import annotations

import contextlib
import functools
import io
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import dashpot
import numpy as np
import torch
from dashpot import _check
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_images
from torch import Tensor

from bench import peers
from bench.models import _run

COLORS, GAMMA, STEPS = 256, 1.0, 2000
ROUNDS, SECONDS = 3, 0.5  # of a timing
FITTED = 10_000  # pixels that k-means sees
ALL_K = (1, 2, 4, 8, 16, 32, 64, 128)


class Palette(NamedTuple):
    """A photograph in a few colours: colors (c, 3) in [0, 1], masses (c,) of sum 1, and which
    colour each pixel has (height, width)."""

    colors: Tensor
    masses: Tensor
    labels: Tensor


@functools.cache
def palette(name: str, count: int) -> Palette:
    images = load_sample_images()
    (image,) = (
        image for image, path in zip(images.images, images.filenames, strict=True)
        if Path(path).name == name
    )  # fmt: skip
    pixels = image.reshape(-1, 3) / 255.0
    some = np.random.default_rng(0).choice(len(pixels), FITTED, replace=False)
    means = KMeans(count, n_init=1, random_state=0).fit(pixels[some])
    labels = torch.from_numpy(means.predict(pixels)).long()
    masses = torch.bincount(labels, minlength=count).double() / len(labels)
    colors = torch.from_numpy(means.cluster_centers_)
    return Palette(colors, masses, labels.reshape(image.shape[:2]))


# --------------------------------------------------------------------------------------------
# Contenders: cost (m, n), a (m,), b (n,), k -> plan (m, n), alpha (m,)


def ours(solver: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def solve(cost: Tensor, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        result = dashpot.regularized_ot(
            cost, a, b, max_nz=k, gamma=GAMMA, solver=solver, max_iter=STEPS, tol=1e-9, plan="dense"
        )
        return result.plan, result.alpha

    return solve


def pot(cost: Tensor, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a shape on every evaluation
        plan, log = peers.load("ot.smooth").smooth_ot_semi_dual(
            a.numpy(), b.numpy(), cost.numpy(), GAMMA, "sparsity_constrained", k,
            stopThr=1e-9, numItermax=500, log=True,
        )  # fmt: skip
    return torch.from_numpy(plan), torch.from_numpy(log["alpha"])


def contenders() -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    named = {"dashpot, auto": ours("auto"), "dashpot, lbfgs": ours("lbfgs")}
    return {**named, "POT": pot} if peers.has("ot") else named


# --------------------------------------------------------------------------------------------
# The run


def median_time(function: Callable, *args) -> float:
    """Of ROUNDS calls, or of as many as take SECONDS, after one that is not counted."""

    def once() -> float:
        start = time.perf_counter()
        function(*args)
        return time.perf_counter() - start

    once()
    taken = [once() for _ in range(ROUNDS)]
    while sum(taken) < SECONDS:
        taken.append(once())
    return statistics.median(taken)


def recolored(source: Palette, target: Palette, plan: Tensor) -> Tensor:
    """The source's pixels (height, width, 3) in the target's colours."""
    mass = plan.sum(1, keepdim=True)  # (m, 1)
    colors = torch.where(mass > 0, plan @ target.colors / mass, source.colors)  # (m, 3)
    return colors[source.labels]


def entries(all_k: Sequence[int]) -> tuple[list[dict], dict[int, Tensor]]:
    """Rows for bench.report, and the pictures by k (the first contender's)."""
    source, target = palette("china.jpg", COLORS), palette("flower.jpg", COLORS)
    cost = torch.cdist(source.colors, target.colors).square()  # (m, n)
    a, b = source.masses, target.masses
    rows, pictures = [], {}
    for k in all_k:
        for name, solve in contenders().items():
            seconds = median_time(solve, cost, a, b, k)
            plan, alpha = solve(cost, a, b, k)
            pictures.setdefault(k, recolored(source, target, plan))
            value = dashpot.ot_semidual_value_grad(alpha, cost, a, b, gamma=GAMMA, max_nz=k)[0]
            shown = {
                "value": (value.item(), f"{value.item():.8f}"),
                "nonzeros": (int((plan > 0).sum()), f"{int((plan > 0).sum())}"),
                "row-error": ((plan.sum(1) - a).abs().sum().item(),) * 2,
                "ms": (1e3 * seconds,) * 2,
            }
            for what, (number, cell) in shown.items():
                cell = cell if isinstance(cell, str) else f"{cell:.3g}"
                at = "color_transfer", "contender", name, f"k = {k}", number, cell
                rows.append(_run.row(*at, {"shows": what}, k=k))
    return rows, pictures


def draw(pictures: dict[int, Tensor], file: str) -> None:
    """Source, target and what became of the source for each k, side by side at half size."""
    from matplotlib import pyplot

    both = {name: palette(name, COLORS) for name in ("china.jpg", "flower.jpg")}
    shown = {f"{name}, {COLORS} colours": one.colors[one.labels] for name, one in both.items()}
    shown |= {f"k = {k}": picture for k, picture in pictures.items()}
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.2 * columns, 2.4 * lines), squeeze=False
    )
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, shown.items(), strict=False):
        axis.imshow(picture[::2, ::2].clamp(0, 1).numpy())
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = _run.parser("color_transfer", __doc__)
    parser.add_argument("--picture", metavar="FILE")
    parser.add_argument("--k", type=int, nargs="+", default=list(ALL_K))
    options = parser.parse_args(argv)
    with _check.threads(1):
        rows, pictures = entries(options.k)
    _run.publish(rows, options.json)
    if options.picture:
        draw(pictures, options.picture)


if __name__ == "__main__":
    main()
