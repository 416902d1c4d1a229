"""`python -m dashpot demo`: a PyTorch classifier trained by workers of which some are Byzantine.

15 simulated workers hold scikit-learn's handwritten digits in shards of unequal classes; 3 of them
send what an attack tells them to. The training loop is plain PyTorch and takes the aggregation rule
as an argument, so the rules are exchanged in one line. All rules see the same model at the start,
the same minibatches, the same learning rate and the same attacks.

Shapes: p workers, S parameters of the model, d coordinates of all of them together, n images.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import dashpot
from dashpot import _check, _measure, _terminal, attacks

Gradient = list[Tensor]  # S tensors, one worker's gradient
Rule = Callable[[list[Gradient]], Gradient]
Attack = Callable[[list[Gradient], list[Gradient], torch.Generator], list[Gradient]]

WORKERS, BYZANTINE = 15, 3
SEED = 0
SKEW = 0.3  # Dirichlet parameter of the classes' shares: small means workers that differ
BATCH, LEARNING_RATE, MOMENTUM = 16, 0.1, 0.9

# --------------------------------------------------------------------------------------------
# The rules


def mean(grads: list[Gradient]) -> Gradient:
    return [torch.stack(column).mean(0) for column in zip(*grads, strict=True)]


def coordinate_median(grads: list[Gradient]) -> Gradient:
    return [torch.stack(column).median(0).values for column in zip(*grads, strict=True)]


def flag(grads: list[Gradient]) -> Gradient:
    return dashpot.flag_aggregate(grads, output="rescaled")


RULES: dict[str, Rule] = {"mean": mean, "median": coordinate_median, "flag_aggregate": flag}


# --------------------------------------------------------------------------------------------
# The attacks: (honest gradients, the Byzantine workers' own, generator) -> what those send

# The constants are those of the Flag Aggregator's published code.
ATTACKS: dict[str, Attack | None] = {
    "no attack": None,
    "sign flip, -mean": lambda honest, own, _: attacks.sign_flip(honest, len(own)),
    "ALIE, mean - 0.21 std": lambda honest, own, _: attacks.alie(honest, len(own)),
    "reverse, -10 times own": lambda honest, own, _: attacks.reverse(honest, len(own), own=own),
    "uniform noise in [0, 1)": lambda honest, own, generator: attacks.uniform(
        honest, len(own), generator=generator
    ),
    "NaN": lambda honest, own, _: attacks.constant(honest, len(own), value=math.nan),
}
QUICK_ATTACKS = ("no attack", "reverse, -10 times own", "NaN")


# --------------------------------------------------------------------------------------------
# The data and the model


@dataclass
class Digits:
    """Images (n, 1, 8, 8) float32 in [0, 1], labels (n,); `shards[i]` are worker i's indices."""

    images: Tensor
    labels: Tensor
    shards: list[Tensor]
    test: Tensor


def load_digits() -> Digits:
    """scikit-learn's digits: a quarter held out for the test, the rest dealt to the workers."""
    import numpy
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        numpy.arange(len(digits.target)), test_size=0.25, stratify=digits.target, random_state=SEED
    )
    random = numpy.random.default_rng(SEED)
    shards: list[list[int]] = [[] for _ in range(WORKERS)]
    for label in range(10):
        members = train[digits.target[train] == label]
        shares = random.dirichlet([SKEW] * WORKERS)  # (p,)
        cuts = (shares.cumsum()[:-1] * len(members)).astype(int)
        for shard, part in zip(shards, numpy.split(members, cuts), strict=True):
            shard += part.tolist()
    return Digits(
        images=torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16,
        labels=torch.tensor(digits.target),
        shards=[torch.tensor(shard) for shard in shards],
        test=torch.tensor(test),
    )


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


# --------------------------------------------------------------------------------------------
# The training


def train(
    data: Digits,
    aggregate: Rule,
    attack: Attack | None,
    steps: int,
    advance: Callable[[], None] = lambda: None,
) -> list[tuple[int, float]]:
    """Train by stochastic gradient descent; returns (step, accuracy on the test images).

    `advance()` is called before each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.Generator().manual_seed(SEED + 1)  # apart: no attack changes the minibatches
    history = []
    for step in range(1, steps + 1):
        advance()
        grads = []  # p lists of S tensors
        for shard in data.shards:
            batch = shard[torch.randint(len(shard), (BATCH,), generator=generator)]  # (BATCH,)
            loss = nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch])
            grads.append(list(torch.autograd.grad(loss, parameters)))
        if attack is not None:
            honest, own = grads[:-BYZANTINE], grads[-BYZANTINE:]
            grads = honest + attack(honest, own, noise)
        update = aggregate(grads)  # the one line that a rule changes
        for parameter, gradient in zip(parameters, update, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if step % 10 == 0 or step == steps:
            history.append((step, accuracy(model, data)))
    return history


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    guess = model(data.images[data.test]).argmax(1)  # (n,)
    return (guess == data.labels[data.test]).float().mean().item()


# --------------------------------------------------------------------------------------------
# The time of one aggregation


def flag_by_svd(rows: Tensor, lam: float = 0.0) -> Tensor:
    """The published algorithm with its defaults (random start, one reweighting step, SVD of the
    weighted workers and, for lam > 0, of their differences in both orders): rows (p, d) -> update
    (d,). Benchmarks time it as well."""
    p, eps = len(rows), 1e-7
    m = (p + 1) // 2
    x = (rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)).mT  # (d, p)
    generator = torch.Generator(rows.device).manual_seed(SEED)
    start = torch.randn(len(x), m, generator=generator, device=rows.device, dtype=rows.dtype)
    y = torch.linalg.qr(start)[0]  # (d, m)
    weight = (1 - (y.mT @ x).square().sum(0) + eps) ** -0.5  # (p,)
    columns = weight.sqrt() * x
    if lam:
        i, j = (~torch.eye(p, dtype=torch.bool, device=rows.device)).nonzero().unbind(1)
        gaps = x[:, i] - x[:, j]  # (d, p (p - 1))
        weight = (1 - (y.mT @ gaps).square().sum(0)).abs() + eps
        columns = torch.cat((columns, lam / (p * (p - 1)) * weight**-0.25 * gaps), 1)
    y = torch.linalg.svd(columns, full_matrices=False)[0][:, :m]
    return y @ (y.mT @ x.sum(1)) / m


def example_rows(d: int) -> Tensor:
    """Rows (p, d) of 8 directions and a little noise: the subspace is well defined, and all
    forms find the same one."""
    generator = torch.Generator().manual_seed(SEED)
    mixing = torch.randn(WORKERS, 8, generator=generator)  # (p, m)
    rows = mixing @ torch.randn(8, d, generator=generator)
    return rows + 0.1 * torch.randn(WORKERS, d, generator=generator)


def flag_by_gram(rows: Tensor) -> Tensor:
    """dashpot's algorithm in pure PyTorch: rows (p, d) -> update (d,)."""
    with dashpot.backend("reference"):
        return dashpot.flag_aggregate(rows)


@dataclass
class Timing:
    """seconds: median of one aggregation. error: distance to the float64 result, relative to its
    length; None for a rule that is not the Flag Aggregator."""

    seconds: float
    error: float | None


TIMED = {
    "flag_aggregate, dashpot": dashpot.flag_aggregate,
    "flag_aggregate, pure PyTorch on the Gram matrix": flag_by_gram,
    "flag_aggregate, official form: SVD of d x p": flag_by_svd,
    "median, PyTorch": lambda rows: rows.median(0).values,
    "mean, PyTorch": lambda rows: rows.mean(0),
}


def time_rules(d: int, budget: float, step: Callable[[str], None]) -> dict[str, Timing]:
    """Each entry of TIMED for `budget` seconds on rows (p, d) in float32. Calls `step(name)` before
    each. dashpot's kernels are those that the dispatcher chooses."""
    rows = example_rows(d)
    inputs = _measure.rotated((rows,), "cpu")
    truth = flag_by_gram(rows.double())  # (d,)
    timings = {}
    for name, rule in TIMED.items():
        step(name)
        error = None
        if name.startswith("flag"):
            error = ((rule(rows) - truth).norm() / truth.norm()).item()
        seconds = _measure.times(rule, inputs, budget, "cpu")
        timings[name] = Timing(statistics.median(seconds), error)
    return timings


# --------------------------------------------------------------------------------------------
# The report


@dataclass
class Result:
    """accuracy[attack][rule]: (step, accuracy) pairs up to `steps`; timings, by name as in TIMED,
    on d coordinates."""

    accuracy: dict[str, dict[str, list[tuple[int, float]]]]
    steps: int
    timings: dict[str, Timing]
    d: int


def run(output: str | Path | None = None, quick: bool = False) -> None:
    """Train under each attack with each rule, time the rules, print both, plot to `output`
    (demo.png). quick: fewer attacks, steps and coordinates."""
    _require("matplotlib", "numpy", "sklearn")
    report(compute(quick), output or "demo.png")


def compute(quick: bool) -> Result:
    names = QUICK_ATTACKS if quick else tuple(ATTACKS)
    steps, d, budget = (60, 100_000, 0.3) if quick else (150, 1_000_000, 2.0)
    data = load_digits()
    curves = {}
    with _terminal.progress(len(names) * len(RULES) * steps + len(TIMED), "demo") as step:
        with _check.threads(1):  # matrices this small: threads would only wait for each other
            for attack in names:
                curves[attack] = {
                    name: train(
                        data, rule, ATTACKS[attack], steps, partial(step, f"{attack}: {name}")
                    )
                    for name, rule in RULES.items()
                }
        return Result(curves, steps, time_rules(d, budget, step), d)


def report(result: Result, output: str | Path) -> None:
    _print(result)
    _plot(result, output)
    print(
        f"The plot is in {output}, and in your own training loop the rule is one line, "
        'update = dashpot.flag_aggregate(grads, output="rescaled"), where grads is a tensor '
        "(p, ...), a list of p tensors or p lists of parameters' gradients."
    )


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the demo needs {', '.join(missing)}: pip install 'dashpot[demo]'", name=missing[0]
        )


def _print(result: Result) -> None:
    parameters = sum(parameter.numel() for parameter in classifier().parameters())
    print(
        f"A classifier of handwritten digits ({parameters:,} parameters), trained by {WORKERS} "
        f"workers of which {BYZANTINE} are Byzantine.\n"
    )
    _terminal.table(
        ["attack", *RULES],
        [
            [attack, *(f"{history[-1][1]:.3f}" for history in by_rule.values())]
            for attack, by_rule in result.accuracy.items()
        ],
        title=f"Accuracy on held-out images after {result.steps} steps (chance: 0.1)",
    )
    own = next(iter(result.timings.values())).seconds
    _terminal.table(
        ["rule", "ms", "times dashpot's", "relative error"],
        [
            [
                name,
                f"{1e3 * timing.seconds:.2f}",
                f"{timing.seconds / own:.2f}",
                "" if timing.error is None else f"{timing.error:.0e}",
            ]
            for name, timing in result.timings.items()
        ],
        title=f"Time of one aggregation, p = {WORKERS}, d = {result.d:,}, float32, "
        f"{torch.get_num_threads()} threads",
    )


def _plot(result: Result, output: str | Path) -> None:
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(result.accuracy) // columns)
    figure = Figure(figsize=(10, 2.7 * lines + 2.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.7 * lines, 2.4])
    panels = top.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (attack, by_rule) in zip(panels.flat, result.accuracy.items(), strict=False):
        for (name, history), style in zip(by_rule.items(), ("--", ":", "-"), strict=True):
            axes.plot(*zip(*history, strict=True), style, label=name, linewidth=2)
        axes.set_title(attack, fontsize=10)
        axes.set_ylim(0, 1)
    panels[0, 0].legend(fontsize=8, loc="lower right")
    top.supxlabel("step", fontsize=10)
    top.supylabel("accuracy on held-out images", fontsize=10)
    axes = bottom.subplots()
    values = [1e3 * timing.seconds for timing in result.timings.values()]
    colors = ["C2" if "dashpot" in name else "0.65" for name in result.timings]
    bars = axes.barh(list(result.timings), values, color=colors)
    axes.bar_label(bars, fmt="%.3g ms", padding=3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 3, max(values) * 3)
    axes.set_title(
        f"time of one aggregation, p = {WORKERS}, d = {result.d:,}, float32 (ms, logarithmic)",
        fontsize=10,
    )
    figure.savefig(output, dpi=120)
