"""python -m bench.models.ot_solvers [--json FILE] [--small | --batch]: whole solves against POT's
semi-dual, and a batch of small problems against as many calls.

The problems of the specification's table, float64, gamma 1: squared distances of two clouds of
points (uniform masses), and a router's 1024 tokens by 32 experts (masses 1 and 32). POT runs its
own stop (1e-9) and 500 iterations. Ours takes the least of STEPS that reaches POT's value, so that
times are compared at the same or a better objective.

The batch: 64 groups of 256 tokens by 16 experts, at most 32 tokens each, float32, by the router's
recipe (20 steps of Adam) and by "auto"; one call and 64 calls take turns, for TURNS turns and
SECONDS seconds at least; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import dashpot
import numpy as np
import torch
from dashpot import _check
from torch import Tensor

from bench.models import _run
from bench.models.color_transfer import median_time, pot

TURNS, SECONDS = 9, 2.0
STEPS = (*range(10, 40), 40, 60, 80, 100, 150, 200, 300, 400, 500, 1000)


def points(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """cost (m, m), a (m,), b (m,)."""
    random = np.random.default_rng(0)
    x, y = random.standard_normal((size, 2)), random.standard_normal((size, 2)) + 1
    mass = torch.full((size,), 1 / size, dtype=torch.float64)
    return torch.from_numpy(((x[:, None] - y) ** 2).sum(-1)), mass, mass


def router() -> tuple[Tensor, Tensor, Tensor]:
    """cost (1024, 32) = -softmax of noise, a (1024,), b (32,)."""
    e = np.exp(np.random.default_rng(1).standard_normal((1024, 32)))
    cost = torch.from_numpy(-e / e.sum(1, keepdims=True))
    ones = torch.ones(1024, dtype=torch.float64)
    return cost, ones, torch.full((32,), 32.0, dtype=torch.float64)


def problems(small: bool) -> dict[str, tuple]:
    """Title -> (cost, a, b), k."""
    found = {f"64 x 64, k = {k}": (points(64), k) for k in (2, 8)}
    if not small:
        found |= {f"512 x 512, k = {k}": (points(512), k) for k in (2, 8)}
        found |= {f"1024 x 32, k = {k}": (router(), k) for k in (32, 36, 48, 64)}
    return found


def entries(small: bool, threads: int) -> list[dict]:
    """Rows for bench.report."""
    rows = []
    for title, (problem, k) in problems(small).items():
        seconds = {"POT": median_time(pot, *problem, k)}
        alpha = pot(*problem, k)[1]
        value = {"POT": dashpot.ot_semidual_value_grad(alpha, *problem, max_nz=k)[0].item()}
        for steps in STEPS:

            def solve(cost, a, b, steps=steps, k=k):
                return dashpot.regularized_ot(cost, a, b, max_nz=k, max_iter=steps, tol=1e-9)

            value["dashpot"] = solve(*problem).value.item()
            if value["dashpot"] >= value["POT"]:
                break
        seconds["dashpot"] = median_time(solve, *problem)
        shown = {f"{name}, ms": 1e3 * seconds[name] for name in ("dashpot", "POT")}
        shown["times faster"] = seconds["POT"] / seconds["dashpot"]
        shown |= {"steps": steps, "dashpot, value": value["dashpot"], "POT, value": value["POT"]}
        for column, number in shown.items():
            cell = f"{number:.6f}" if "value" in column else f"{number:.3g}"
            at = "ot_solvers", "problem", title, column, number, cell
            rows.append(_run.row(*at, {"threads": threads}))
    return rows


def batch_entries(threads: int) -> list[dict]:
    """Rows for bench.report: one call for 64 problems, and 64 calls."""
    noise = torch.randn(64, 256, 16, generator=torch.Generator().manual_seed(0))
    cost, a, b = -noise.softmax(-1), torch.ones(64, 256), torch.full((64, 16), 16.0)
    recipes = {
        "router's recipe (adam, 20 steps)": {"solver": "adam", "max_iter": 20}, "auto": {}
    }  # fmt: skip
    rows = []
    for title, options in recipes.items():

        def together(options=options):
            return dashpot.regularized_ot(cost, a, b, max_nz=32, **options)

        def apart(options=options):
            return [
                dashpot.regularized_ot(*problem, max_nz=32, **options)
                for problem in zip(cost, a, b, strict=True)
            ]

        taken = {together: [], apart: []}
        while len(taken[apart]) < TURNS or sum(map(sum, taken.values())) < SECONDS:
            for run, seconds in taken.items():
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        one, many = (statistics.median(seconds) for seconds in taken.values())
        shown = {"one call, ms": 1e3 * one, "64 calls, ms": 1e3 * many, "times faster": many / one}
        for column, number in shown.items():
            at = "ot_batch", "64 of 256 x 16, k = 32", title, column, number, f"{number:.3g}"
            rows.append(_run.row(*at, {"threads": threads}))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = _run.parser("ot_solvers", __doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--small", action="store_true", help="64 x 64 only")
    parser.add_argument("--batch", action="store_true", help="the batch only")
    options = parser.parse_args(argv)
    rows = []
    for threads in options.threads:
        with _check.threads(threads):
            if not options.batch:
                rows += entries(options.small, threads)
            if not options.small:
                rows += batch_entries(threads)
    _run.publish(rows, options.json)


if __name__ == "__main__":
    main()
