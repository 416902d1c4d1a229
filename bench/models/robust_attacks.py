"""python -m bench.models.robust_attacks [--json FILE]: the error of the aggregate under attack.

p = 15 workers of which f are Byzantine, every rule against every attack. What is compared with the
mean of the honest rows is the update that the rule returns: its distance, relative to the mean's
length, and its cosine to the mean. Three kinds of honest rows:

    digits      minibatch gradients (17,226 numbers) of a real classifier on scikit-learn's digits,
                taken in the course of its training; every worker draws from all images
    skewed      the same with images dealt out by class, most workers lacking some
    noise       a fixed direction and noise of the same length, d = 20,000 (signal to noise 1)

Every entry is the median over DRAWS draws; all is seeded. The f that a rule is told is the true
one. Prints Markdown tables; the JSON is read by `python -m bench.report`, where a block is chosen
as in <!-- bench:robust_attacks rows=digits f=3 shows=error -->, and column=A,B chooses attacks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import dashpot
import torch
from dashpot import _check, _demo, attacks
from torch import Tensor, nn

from bench.models import _run

P, DRAWS, BATCH = 15, 9, 16
NOISE_D = 20_000

Rule = Callable[[Tensor], Tensor]
Attack = Callable[[Tensor, int, torch.Generator], Tensor]


def rules(f: int) -> dict[str, Rule]:
    """Name -> rows (p, d) to update (d,). Centered clipping gets the usual centre, an older update:
    here the median worker's length as radius and the origin."""

    def clipping(rows: Tensor) -> Tensor:
        tau = rows[:-f].norm(dim=1).median().item()
        return dashpot.centered_clipping(rows, tau, n_iter=3)

    named = {
        "mean": ("mean", {}),
        "flag, official": ("flag", {}),
        "flag, rescaled": ("flag", {"output": "rescaled"}),
        "flag, paper": ("flag", {"output": "paper"}),
        "geometric median": ("geometric_median", {}),
        "krum": ("krum", {"f": f}),
        "multi-krum": ("multi_krum", {"f": f}),
        "mda": ("mda", {"f": f}),
        "monna": ("monna", {"f": f, "idx": 0}),
        "median": ("coordinate_median", {}),
        "trimmed mean": ("trimmed_mean", {"f": f}),
        "meamed": ("meamed", {"f": f}),
        "phocas": ("phocas", {"f": f}),
        "bulyan": ("bulyan", {"f": f}),
        "nnm + geometric median": ("geometric_median", {"pre": [dashpot.NNM(f)]}),
    }
    made = {
        label: partial(dashpot.robust_aggregate, rule=name, **options)
        for label, (name, options) in named.items()
    }
    return {**made, "centered clipping": clipping}


# Published constants where there are any; the last three are what a broken worker sends.
ATTACKS: dict[str, Attack | None] = {
    "none": None,  # all p workers are honest, and their mean is the truth
    "sign-flip": lambda honest, f, g: attacks.sign_flip(honest, f),
    "IPM-0.1": lambda honest, f, g: attacks.inner_product_manipulation(honest, f),
    "IPM-2": lambda honest, f, g: attacks.inner_product_manipulation(honest, f, scale=2.0),
    "ALIE-0.21": lambda honest, f, g: attacks.alie(honest, f),
    "ALIE+1.5": lambda honest, f, g: attacks.alie(honest, f, deviations=1.5),
    "reverse-10": lambda honest, f, g: attacks.reverse(honest, f),
    "mimic": lambda honest, f, g: attacks.mimic(honest, f),
    "uniform": lambda honest, f, g: attacks.uniform(honest, f, generator=g),
    "N(0;100²)": lambda honest, f, g: attacks.gaussian(honest, f, std=100.0, generator=g),
    "1e6": lambda honest, f, g: attacks.constant(honest, f),
    "bit-flip": lambda honest, f, g: attacks.bit_flip(honest, f),
    "NaN": lambda honest, f, g: attacks.constant(honest, f, value=math.nan),
}


# --------------------------------------------------------------------------------------------
# The honest rows


def digits(skewed: bool) -> Iterator[Tensor]:
    """Gradients (p, d) float32 at every fifth step of training by their mean."""
    data = _demo.load_digits()
    everything = torch.cat(data.shards)
    shards = data.shards if skewed else [everything] * P
    torch.manual_seed(0)
    model = _demo.classifier()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=_demo.LEARNING_RATE, momentum=_demo.MOMENTUM)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 5 * DRAWS + 1):
        rows = []
        for shard in shards:
            batch = shard[torch.randint(len(shard), (BATCH,), generator=generator)]
            loss = nn.functional.cross_entropy(model(data.images[batch]), data.labels[batch])
            grads = torch.autograd.grad(loss, parameters)
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        rows = torch.stack(rows)
        for parameter, grad in zip(
            parameters, rows.mean(0).split([q.numel() for q in parameters]), strict=True
        ):
            parameter.grad = grad.view(parameter.shape)
        optimizer.step()
        if step % 5 == 0:
            yield rows


def noise() -> Iterator[Tensor]:
    """A direction (d,) and noise of its length for each worker: (p, d) float32."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        direction = torch.randn(NOISE_D, generator=generator)
        yield direction + torch.randn(P, NOISE_D, generator=generator)


SCENES: dict[str, Callable[[], Iterator[Tensor]]] = {
    "digits": partial(digits, skewed=False),
    "skewed": partial(digits, skewed=True),
    "noise": noise,
}


# --------------------------------------------------------------------------------------------
# The run


def measure(scene: str, f: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(rule, attack) -> median error and median cosine; an update that is not finite is inf, 0."""
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    generator = torch.Generator().manual_seed(1)
    for rows in SCENES[scene]():
        honest = rows[: P - f]
        for attack, send in ATTACKS.items():
            received = torch.cat([honest, send(honest, f, generator)]) if send else rows
            truth = (honest if send else rows).double().mean(0)
            for rule, aggregate in rules(f).items():
                update = aggregate(received).double()
                error = ((update - truth).norm() / truth.norm()).item()
                cosine = nn.functional.cosine_similarity(update, truth, dim=0).item()
                finite = math.isfinite(error)
                seen.setdefault((rule, attack), []).append(
                    (error, cosine) if finite else (math.inf, 0.0)
                )
    return {
        key: tuple(statistics.median(column) for column in zip(*pairs, strict=True))
        for key, pairs in seen.items()
    }


def number(value: float) -> str:
    """0.13, 11.1, 2e+05."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0e}"


def entries(scene: str, f: int) -> list[dict]:
    """Rows for bench.report."""
    measured = measure(scene, f)
    return [
        _run.row("robust_attacks", "rule", rule, attack, value, number(value),
                 {"rows": scene, "f": f, "shows": what})
        for at, what in enumerate(("error", "cosine"))
        for (rule, attack), pair in measured.items()
        for value in (pair[at],)
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = _run.parser("robust_attacks", __doc__)
    parser.add_argument("--byzantine", type=int, nargs="+", default=[1, 2, 3], metavar="F")
    parser.add_argument("--rows", nargs="+", choices=SCENES, default=list(SCENES))
    options = parser.parse_args(argv)
    with _check.threads(1):
        rows = [
            row for scene in options.rows for f in options.byzantine for row in entries(scene, f)
        ]
    _run.publish(rows, options.json)


if __name__ == "__main__":
    main()
