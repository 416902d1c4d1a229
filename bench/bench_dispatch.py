"""The dispatcher's budget: what a call costs beyond the backend's own function.

combine on an (8, 32) float32 tensor, forward only, one thread. The ways are timed in turns of LOOPS
calls, so that all meet the same machine; `added_us` is the difference of the least times, which
other processes disturb least, `added_us_median` that of the medians.
"""

import statistics
import timeit

import dashpot
import pytest
import torch
from dashpot import _check
from dashpot._backends import Kernel
from dashpot._info import environment
from dashpot.aggregate import COMBINE

LOOPS = 100
REPEATS = 150
BUDGET_US = {"no_grad": 2.0, "grad": 7.0}  # of "Op.__call__"; the other ways are for information
WAYS = ("Op.__call__", "dashpot.combine", "torch.ops")


def _stub() -> Kernel:
    """A backend that does nothing, where there is no compiled module."""
    update = torch.zeros(32)  # (d,)
    return Kernel("stub", lambda *args: [update.clone()], None, None, ("cpu",), {torch.float32})


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    """The kernel that serves the call: compiled, or the stub."""
    found = COMBINE.kernels("cpu")
    if not found:
        found = (_stub(),)
        monkeypatch.setitem(COMBINE._kernels, "cpu", found)
    return found[0]


def _microseconds(functions: dict) -> dict[str, list[float]]:
    """Microseconds per call of each function; timeit keeps the garbage collector out."""
    samples = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            samples[name].append(timeit.timeit(function, number=LOOPS) / LOOPS * 1e6)
    return samples


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", BUDGET_US)
def test_dispatch(benchmark, kernel, mode, way):
    rows = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))  # (p, d)
    coeffs = torch.full((8,), 0.125, dtype=torch.float64)  # (p,)
    rows.requires_grad_(mode == "grad")
    bare = rows.detach()  # the backend's function knows no gradients
    calls = {
        "Op.__call__": lambda: COMBINE([rows], coeffs, 8),
        "dashpot.combine": lambda: dashpot.combine(rows, coeffs),
        "torch.ops": lambda: torch.ops.dashpot.combine_forward([rows], coeffs, 8),
    }
    with _check.threads(1):
        seen = _microseconds({"direct": lambda: kernel.forward([bare], coeffs, 8), way: calls[way]})
        benchmark.pedantic(calls[way], rounds=REPEATS, iterations=LOOPS, warmup_rounds=1)
    direct, call = min(seen["direct"]), min(seen[way])
    budget = BUDGET_US[mode] if way == "Op.__call__" else None
    benchmark.group = f"dispatch {mode}"
    benchmark.extra_info.update(
        op="dispatch", mode=mode, way=way, backend=kernel.name, direct_us=direct, call_us=call,
        added_us=call - direct, budget_us=budget,
        added_us_median=statistics.median(seen[way]) - statistics.median(seen["direct"]),
        within_budget=None if budget is None else call - direct <= budget, **environment("cpu"),
    )  # fmt: skip
