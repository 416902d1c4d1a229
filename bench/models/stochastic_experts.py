"""Re-enacts in small what the paper on stochastic experts claims: with the consistency loss they do
no worse than a Switch layer at equal cost.

    python -m bench.models.stochastic_experts [--seeds 5] [--steps 600] [--json FILE]

A Transformer of two layers reads scikit-learn's handwritten digits as sequences of eight rows of
eight pixels. Few images are for training, so that what regularises shows. Every contender takes the
same number of steps of the same number of rows, with the same optimizer, rate and width, and at
evaluation each token goes through one feed-forward block of the same size:

    dense           the feed-forward blocks as they are, 2B images a step
    dense, twice    each of B images twice, with the consistency loss: dropout alone tells the
                    passes apart
    switch          SwitchExperts and the router's losses, 2B images a step
    random          StochasticExperts, each of B images twice, no consistency (alpha 0)
    stochastic      the same with the consistency loss: the paper's method

What is printed: test accuracy and cross entropy, mean and standard deviation over the seeds
(weights, order, and which images are for training), for each contender how its accuracy differs
from Switch's on the same seeds, with the standard error of that, and the accuracy with the mean of
all experts and with one fixed expert at evaluation.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dashpot import _check
from dashpot.experts import (
    StochasticExperts,
    SwitchExperts,
    auxiliary_loss,
    convert,
    two_pass_loss,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.models import _run

CLASSES, ROWS, PIXELS = 10, 8, 8
WIDTH, HIDDEN, LAYERS, HEADS = 32, 64, 2, 4
EXPERTS, TRAINING, BATCH, ALPHA, RATE, DROPOUT = 4, 400, 32, 5.0, 2e-3, 0.1

COLUMNS = {  # of the table: what `train` returns
    "test accuracy, %": "accuracy", "cross entropy": "cross entropy",
    "accuracy minus Switch's": "minus switch", "mean of experts, %": "accuracy, average",
    "one expert, %": "accuracy, fixed",
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """experts: the class, or None. alpha: None is one pass over 2B images."""

    experts: type | None
    alpha: float | None


CONTENDERS = {
    "dense": Contender(None, None),
    "dense, twice": Contender(None, ALPHA),
    "switch": Contender(SwitchExperts, None),
    "random": Contender(StochasticExperts, 0.0),
    "stochastic": Contender(StochasticExperts, ALPHA),
}


class Reader(nn.Module):
    """Images (B, 8, 8) -> logits (B, 10)."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Linear(PIXELS, WIDTH)
        self.positions = nn.Parameter(torch.randn(ROWS, WIDTH) * 0.1)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, DROPOUT, batch_first=True), LAYERS
        )
        self.classes = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.encoder(self.rows(images) + self.positions).mean(1))


def build(contender: Contender) -> Reader:
    model = Reader()
    if contender.experts is not None:
        options = {"level": "sequence"} if contender.experts is StochasticExperts else {}
        for layer in convert(
            model, EXPERTS, layers="all", experts=contender.experts, **options
        ).values():
            layer.reset_parameters()  # experts that start apart, each as a dense block does
    return model


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    first, rest = order[:TRAINING], order[TRAINING:]
    return images[first], labels[first], images[rest], labels[rest]


def train(contender: Contender, seed: int, steps: int) -> dict[str, float]:
    """Test accuracy and cross entropy, accuracy of other inference; seconds of training."""
    images, labels, test_images, test_labels = digits(seed)
    torch.manual_seed(seed)
    model = build(contender)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    passes = 1 if contender.alpha is None else 2
    start = time.perf_counter()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (2 * BATCH // passes,))
        x, y = images[chosen], labels[chosen]
        if contender.alpha is None:
            loss = F.cross_entropy(model(x), y)
        else:  # both cross entropies are summed: halved, the rate means the same
            loss = two_pass_loss(model, x, y, alpha=contender.alpha).loss / 2
        if contender.experts is SwitchExperts:
            loss = loss + auxiliary_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    result = {"seconds": time.perf_counter() - start}
    model.eval()
    with torch.no_grad():
        torch.manual_seed(seed)  # of the routes
        logits = model(test_images)
        result["accuracy"] = 100 * (logits.argmax(1) == test_labels).double().mean().item()
        result["cross entropy"] = F.cross_entropy(logits, test_labels).item()
        for mode in ("average", "fixed") if contender.experts is StochasticExperts else ():
            for module in model.modules():
                if isinstance(module, StochasticExperts):
                    module.inference = mode
            right = model(test_images).argmax(1) == test_labels
            result[f"accuracy, {mode}"] = 100 * right.double().mean().item()
    return result


def run(seeds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    return {
        name: [train(contender, seed, steps) for seed in range(seeds)]
        for name, contender in CONTENDERS.items()
    }


def spread(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def entries(results: dict[str, list[dict[str, float]]], steps: int) -> list[dict]:
    """Rows for bench.report: a line for each contender."""
    seeds = len(results["switch"])
    rows = []
    for name, runs in results.items():
        numbers = {key: [run[key] for run in runs] for key in runs[0]}
        for column, key in COLUMNS.items():
            if key == "minus switch":
                pairs = zip(numbers["accuracy"], results["switch"], strict=True)
                value, deviation = spread([own - base["accuracy"] for own, base in pairs])
                error, digits = deviation / math.sqrt(seeds), 2
            elif key in numbers:
                value, error = spread(numbers[key])
                digits = 3 if key == "cross entropy" else 2
            else:
                continue
            cell = f"{value:.{digits}f}" + f" ± {error:.{digits}f}" * (seeds > 1)
            at = "stochastic_experts", "experts", name, column, value, cell
            error = error if seeds > 1 else None
            rows.append(_run.row(*at, {"seeds": seeds, "steps": steps}, error=error))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = _run.parser("stochastic_experts", __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    with _check.threads(options.threads):
        rows = entries(run(options.seeds, options.steps), options.steps)
    _run.publish(rows, options.json)


if __name__ == "__main__":
    main()
