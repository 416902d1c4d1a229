"""The fixture `measure`. A bench file names an op, its sizes and its peers; the rest is here.

    OP = "gram"                                # in dashpot's registry
    SIZES = {torch.float32: [(15, 1_000_000)]}   # by dtype, what the op's `inputs` takes
    OPTIONS = [{}, {"lam": 1.0}]               # keyword arguments (optional)
    PEERS = {"X @ X.T": Peer(...)}             # the same result by other means (optional)
    GRADIENT = (0,)                            # forward + backward, for these arguments (optional)
    FLOOR = lambda *args: (bytes, flops)       # of both passes; default: the op's own (optional)

    def test_gram(measure):
        measure()

One row for each size, dtype, options, thread count and contender (the op's backends on this device,
then the peers): checked first (`dashpot._measure.verify`), timed on the CPU's or the GPU's clock in
alternation with the others on the same inputs, and handed to pytest-benchmark, with bytes, floor,
memory and versions in `extra_info`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from dashpot import _measure
from dashpot._bench import option_label, size_label
from dashpot._dispatch import REGISTRY
from dashpot._info import default_device, environment

from bench import peers

DEVICE = default_device()


def pytest_addoption(parser):
    group = parser.getgroup("dashpot")
    group.addoption("--threads", help="CPU thread counts, as 1,2; default: 1 and torch's own")
    group.addoption("--time", type=float, help="seconds per row; default 0.15, with --quick 0.05")
    group.addoption(
        "--quick", action="store_true", help="two sizes and one thread count for each op"
    )


class Clock:
    """pytest-benchmark's timer: it shows what was measured before, on the device's own clock."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, seconds: list[float]) -> Callable[[], None]:
        """A target for `pedantic` that takes the next of `seconds` at each call."""
        turn = itertools.cycle(seconds)

        def target() -> None:
            self.now += next(turn)

        return target


CLOCK = Clock()


@dataclasses.dataclass
class Plan:
    """One row to measure."""

    op: str
    size: tuple
    dtype: torch.dtype
    options: dict
    threads: int
    contender: str
    peer: _measure.Peer | None
    gradient: tuple[int, ...]
    bound: Callable | None

    @property
    def group(self) -> str:
        options = [f"{name}={option_label(value)}" for name, value in self.options.items()]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join((self.op, size_label(self.size), dtype, *options, f"t={self.threads}"))


PLANS: dict[str, Plan] = {}  # by name: a parameter goes into the results, so it is a string


def _threads(config) -> list[int]:
    text, own = config.getoption("threads"), torch.get_num_threads()
    if text:
        return [int(count) for count in text.split(",")]
    return [own] if DEVICE == "cuda" or config.getoption("quick") else sorted({1, own})


def _alike(op, size: tuple) -> tuple:
    """The largest test size of the same form: who takes it is asked before anything is timed."""

    def form(size: tuple) -> list:
        return [type(value) for value in size]

    alike = [one for one in op.sizes["test"] if form(one) == form(size)]
    return max(alike, key=lambda one: math.prod(n for n in one if isinstance(n, int)))


def plans(config, module) -> list[Plan]:
    """The rows of a bench file; those on the same inputs stand together."""
    op, quick = REGISTRY[module.OP], config.getoption("quick")
    result = []
    rows = [(size, dtype) for dtype, sizes in module.SIZES.items() for size in sizes]
    for (size, dtype), options in itertools.product(
        rows[:2] if quick else rows, getattr(module, "OPTIONS", [{}])
    ):
        small = _measure.case(op, _alike(op, size), dtype, DEVICE, **options)
        contenders = [(name, None) for name in small.backends()] + [
            (name, peer)
            for name, peer in peers.installed(getattr(module, "PEERS", {})).items()
            if peer.when(size, dtype, DEVICE, options)
        ]
        for threads, (name, peer) in itertools.product(_threads(config), contenders):
            result.append(
                Plan(op.name, size, dtype, options, threads, name, peer,
                     getattr(module, "GRADIENT", ()), getattr(module, "FLOOR", None))
            )  # fmt: skip
    return result


def pytest_generate_tests(metafunc):
    if "measure" not in metafunc.fixturenames:
        return
    params = []
    for plan in plans(metafunc.config, metafunc.module):
        name = f"{plan.group} {plan.contender}"
        PLANS[name] = plan
        mark = pytest.mark.benchmark(timer=CLOCK, group=plan.group)
        params.append(pytest.param(name, id=name, marks=mark))
    metafunc.parametrize("measure", params, indirect=True)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # results are published: nothing that names the host
    machine_info.update(environment(DEVICE))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Every round's time stays out of the file: medians and percentiles are what is read."""
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


class Shared:
    """What rows on the same inputs share; only the latest are kept. The first row of a group
    measures all of it, contenders in alternation."""

    def __init__(self):
        self.copy = _measure.CopyLoop(DEVICE)
        self.key, self.args, self.cases, self.inputs = None, (), {}, []
        self.group, self.measured = None, {}

    def case(self, plan: Plan) -> _measure.Case:
        key = (plan.op, plan.size, plan.dtype)
        if key != self.key:
            self.key, self.cases, self.inputs = key, {}, []
            case = _measure.case(REGISTRY[plan.op], plan.size, plan.dtype, DEVICE, plan.gradient)
            self.args, self.inputs = case.args, _measure.rotated(case.args, DEVICE)
        options = tuple(plan.options.items())
        if options not in self.cases:
            self.cases[options] = _measure.Case(
                REGISTRY[plan.op], plan.size, plan.dtype, DEVICE, self.args, plan.options,
                plan.gradient, plan.bound,
            )  # fmt: skip
        return self.cases[options]

    def measure(self, plan: Plan, selected: list[Plan], seconds: float):
        """(Row, seconds of each round) of a plan. selected: all rows that will run."""
        if self.group != plan.group:
            self.group, self.measured = plan.group, {}
            contenders = {one.contender: one.peer for one in selected if one.group == plan.group}
            self.measured = _measure.measure_together(
                self.case(plan), contenders, threads=plan.threads, seconds=seconds, copy=self.copy,
                inputs=self.inputs,
            )  # fmt: skip
        found = self.measured[plan.contender]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(scope="session")
def shared() -> Shared:
    return Shared()


@pytest.fixture
def measure(request, benchmark, shared):
    plan = PLANS[request.param]
    config = request.config
    seconds = config.getoption("time") or (0.05 if config.getoption("quick") else 0.15)

    def run() -> None:
        calls = [getattr(item, "callspec", None) for item in request.session.items]
        names = [call.params["measure"] for call in calls if call and "measure" in call.params]
        row, seen = shared.measure(plan, [PLANS[name] for name in names], seconds)
        versions = {k: v for k, v in environment(DEVICE).items() if k not in ("threads", "device")}
        benchmark.extra_info.update({**dataclasses.asdict(row), **versions})
        benchmark.pedantic(CLOCK.replay(seen), rounds=len(seen))

    return run
