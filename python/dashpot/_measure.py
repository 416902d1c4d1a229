"""How dashpot measures: the one place, for `python -m dashpot bench` and for bench/.

A row is one contender (a backend of the op, or a peer: the same result by other means) on one set
of inputs. It is checked against the float64 truth first and refused if it is wrong. Then calls are
timed on rotated copies of the inputs, so that they come from memory and not from a cache. What is
compared is timed in alternation, a stretch of each in turn and one of a plain copy loop, so that
all contenders and the floor meet the same machine, whatever else it does meanwhile.

    floor = bytes that no implementation can avoid / bandwidth of the copy (bytes read + written)

With `gradient` a call is forward and backward: the gradients of the arguments at those positions
are formed, checked and timed with it. A yardstick (the bare matrix products of a loss, say) is
timed beside the contenders; it computes something else, so it is not checked.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dashpot import _check
from dashpot._backends import backend
from dashpot._dispatch import Chain, Op
from dashpot._info import device_name

PEER_LIMIT = 1e-2
MIN_ROUNDS = 3
MAX_ROUNDS = 400
STRETCHES = 8  # of each contender's timed calls, in turn with the others' and the copies'
_BATCH = 1e-3  # seconds of work between two CUDA events
_COPIES = 64  # of the inputs at most; below that they are realistic to find in a cache


class RefusedError(RuntimeError):
    """A contender whose result is wrong, and therefore was not timed."""


@dataclass
class Row:
    """One measurement; seconds, bytes, bytes per second."""

    op: str
    contender: str
    kind: str  # "backend", "peer" or "yardstick"
    passes: str  # "forward" or "forward + backward"
    size: list
    dtype: str
    options: dict
    device: str
    device_name: str
    threads: int
    median: float
    p20: float
    p80: float
    rounds: int
    bytes: int
    flops: int
    bandwidth: float  # of the copy loop
    floor: float  # seconds
    share: float  # floor / median: 1 is as fast as the memory
    gbps: float  # floor bytes / median
    peak_memory: int  # most allocated at one time beyond the inputs; outputs included
    error: float | None  # of a yardstick: none
    error_limit: float | None


@dataclass
class Peer:
    """The same result by other means. function(*args of the op, **options) -> its outputs.

    when: (size, dtype, device, options) for which it is listed. checked: False for a yardstick.
    needs: the module without which it is not listed.
    """

    function: Callable
    when: Callable = lambda size, dtype, device, options: True
    checked: bool = True
    needs: str | None = None


@dataclass
class Case:
    """An op on one set of inputs; holds what its contenders share.

    gradient: positions of the arguments whose gradient belongs to a call; their tensors require
    it. bound: (*args) -> (bytes, flops) in place of the op's own floor, which is the forward's.
    """

    op: Op | Chain
    size: tuple
    dtype: torch.dtype
    device: str
    args: tuple
    options: dict = field(default_factory=dict)
    gradient: tuple[int, ...] = ()
    bound: Callable | None = None

    @functools.cached_property
    def expected(self) -> _check.Expected:
        return _check.expect(self.op, self.args, self.options, gradients=bool(self.gradient))

    @functools.cached_property
    def floor(self) -> tuple[int, int]:
        """(bytes, flops)"""
        return (self.bound or self.op.floor)(*self.args)

    def step(self, function: Callable) -> Callable:
        """What is timed: function(*args), or its outputs and the gradients asked for."""
        if not self.gradient:
            return function
        cotangents, like = self.expected.cotangents, []
        lists = any(not isinstance(self.args[i], Tensor) for i in self.gradient)

        def run(*args):  # what is timed must be a small op's own: nothing twice, no recursion
            outputs = function(*args)
            if type(outputs) is Tensor:
                outputs = [outputs]
            else:
                outputs = [out for out in _check.flatten(outputs) if out.requires_grad]
            if not like:
                like.extend(c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=False))
            leaves = [args[i] for i in self.gradient]
            leaves = list(_check.flatten(leaves)) if lists else leaves
            return outputs, torch.autograd.grad(outputs[: len(like)], leaves, like)

        return torch.enable_grad()(run)

    def truths(self) -> list[Tensor]:
        """The true outputs, then the true gradients that a call forms."""
        truth = self.expected.truth
        outputs = [value for name, value in truth.items() if name.startswith("output")]
        floats = [
            i for i, arg in enumerate(self.args)
            for x in _check.flatten(arg) if x.is_floating_point()
        ]  # fmt: skip
        return outputs + [
            truth[f"gradient {k}"] for k, i in enumerate(floats) if i in self.gradient
        ]

    def backends(self) -> list[str]:
        return _check.contenders(self.op, self.args, self.options)


def case(
    op: Op | Chain,
    size: tuple,
    dtype: torch.dtype,
    device: str,
    gradient: Sequence[int] = (),
    **options,
) -> Case:
    """The op's own inputs; an op that fixes its dtype (float64 solves) keeps it."""
    args = op.inputs(size, dtype, torch.device(device), 0)
    args = tuple(
        _check.map_tensors(Tensor.requires_grad_, arg) if i in gradient else arg
        for i, arg in enumerate(args)
    )
    found = [x.dtype for x in _check.flatten(args) if x.is_floating_point()]
    dtype = dtype if dtype in found or not found else found[0]
    return Case(op, size, dtype, device, args, options, tuple(gradient))


# --------------------------------------------------------------------------------------------
# Correctness


def verify(row: Case, name: str, function: Callable, is_peer: bool) -> _check.Verdict:
    """Raise RefusedError if a contender is wrong. A peer may be less exact than a backend: it sums
    millions of terms in the input's dtype. It must compute the same thing, to a hundredth or to
    half of the dtype's digits; its error is in the row."""
    if is_peer:
        with torch.no_grad():
            outputs, grads = function(*row.args, **row.options), []
        if row.gradient:
            grads = row.step(functools.partial(function, **row.options))(*row.args)[1]
        verdict = _peer_verdict(row, outputs, grads)
    else:
        verdict = _check.compare(row.op, name, row.args, row.options, expected=row.expected)
    if not verdict.ok or verdict.trivial:
        why = str(verdict) if not verdict.ok else "every expected value is 0"
        raise RefusedError(f"{row.op.name} by {name} on {row.size} {row.dtype}: {why}")
    return verdict


def _peer_verdict(row: Case, got, grads: Sequence[Tensor]) -> _check.Verdict:
    limit = max(PEER_LIMIT, torch.finfo(row.dtype).eps ** 0.5)
    outputs, truths = list(_check.flatten(got)), row.truths()
    if not outputs:
        return _check.Verdict(False, float("inf"), 0.0, limit, why="the peer returned no tensor")
    forward = truths[: len(truths) - len(grads)]
    pairs = [*zip(outputs, forward, strict=False)]  # a peer may leave out later outputs
    pairs += zip(grads, truths[len(forward) :], strict=True)
    error = 0.0
    for one, truth in pairs:
        if one.shape != truth.shape:
            why = f"expected {tuple(truth.shape)}, got {tuple(one.shape)}"
            return _check.Verdict(False, float("inf"), 0.0, limit, why=why)
        error = max(error, _check.error_of(one, truth))
    trivial = all(bool((truth == 0).all()) for truth in truths)
    return _check.Verdict(error <= limit, error, 0.0, limit, "output", trivial=trivial)


# --------------------------------------------------------------------------------------------
# Time


def cache_bytes(device: str) -> int:
    """The last-level cache; 32 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties().L2_cache_size
    listing = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = listing.read_text().strip() if listing.exists() else "32768K"
    return int(text.removesuffix("K")) * 1024


def rotated(args: Sequence, device: str) -> list:
    """Copies of the inputs, together beyond the cache four times over. The inputs themselves are
    not among them: they belong to the check, and an op in place would change them."""
    tensors = list(_check.flatten(args))
    size = max(1, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    count = min(_COPIES, max(2, -(-4 * cache_bytes(device) // size)))

    def copy(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.requires_grad)

    return [_check.map_tensors(copy, args) for _ in range(count)]


class CopyLoop:
    """Plain copies that walk through buffers of four times the cache: what the memory can do.

    A copy moves as many bytes as the op's floor, read and written together, so that both meet
    interruptions alike; but at least LEAST (less measures the call) and at most the buffers.
    """

    LEAST = 1 << 20  # bytes moved by one copy

    def __init__(self, device: str):
        count = 4 * cache_bytes(device) // 4
        self.source = torch.ones(count, device=device)  # (n,)
        self.target = torch.zeros(count, device=device)  # (n,)
        self.device = device
        self.start(0)

    def start(self, size: int) -> None:
        """Forget what was measured; from now on a copy moves about `size` bytes."""
        self.samples: list[float] = []
        count = min(max(size, self.LEAST) // 8, self.source.numel())
        self.bytes = 8 * count
        pairs = zip(self.source.split(count), self.target.split(count), strict=True)
        self.turn = itertools.cycle([pair for pair in pairs if pair[0].numel() == count])

    def run(self) -> None:
        source, target = next(self.turn)
        target.copy_(source)

    @property
    def bandwidth(self) -> float:
        """Bytes per second, read and written."""
        return self.bytes / statistics.median(self.samples)


def _timed(run: Callable, count: int, device: str) -> float:
    """Seconds per call over `count` calls, on the device's own clock."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(count):
        run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / count


def _batch(run: Callable, device: str) -> int:
    """How many calls are timed together: 1 on the CPU, a millisecond's worth on CUDA."""
    if device != "cuda":
        return 1
    torch.cuda.synchronize()
    return max(1, min(1000, int(_BATCH / max(_timed(run, 3, device), 1e-7))))


def times(function: Callable, inputs: Sequence, seconds: float, device: str) -> list[float]:
    """Seconds per call, one entry per round (a call; on CUDA a batch), at least MIN_ROUNDS."""
    return _times_together([(function, None)], inputs, seconds, device)[0]


def _times_together(
    functions: Sequence[tuple[Callable, str | None]], inputs: Sequence, seconds: float,
    device: str, copy: CopyLoop | None = None,
) -> list[list[float]]:  # fmt: skip
    """`times` of several functions, each with the backend to force (or None), in alternation.

    copy: timed for as many rounds, in the same alternation.
    """

    def caller(function: Callable) -> Callable[[], None]:
        turn = itertools.cycle(inputs)

        def run() -> None:
            function(*next(turn))  # the result is freed inside the time, as a caller would

        return run

    found: list[list[float]] = [[] for _ in functions]
    loops = [
        (caller(function), forced, result)
        for (function, forced), result in zip(functions, found, strict=True)
    ]
    if copy is not None:
        loops.append((copy.run, None, copy.samples))
    with torch.no_grad():
        counts = []
        for run, forced, _ in loops:
            with backend(forced):
                if _timed(run, 1, device) < seconds:  # checked already, so slow calls are warm
                    run()
                counts.append(_batch(run, device))
        for stretch in range(1, STRETCHES + 1):
            for (run, forced, result), count in zip(loops, counts, strict=True):
                with backend(forced):
                    _stretch(run, result, count, stretch / STRETCHES, seconds, device)
    return found


def _stretch(run, result: list[float], count: int, part: float, seconds: float, device) -> None:
    """Add rounds to `result` until it holds its part of the seconds, or of the rounds."""
    spent = count * sum(result)
    while len(result) < part * MIN_ROUNDS or (
        spent < part * seconds and len(result) < part * MAX_ROUNDS
    ):
        result.append(_timed(run, count, device))
        spent += count * result[-1]


def peak_memory(function: Callable, args: Sequence, device: str) -> int:
    """Bytes allocated at one time beyond what was there, during a call; outputs included. On the
    CPU as torch's allocator sees it: scratch that C++ keeps for itself is not counted."""
    with torch.no_grad():
        if device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function(*args)
            return torch.cuda.max_memory_allocated() - before
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to stderr otherwise
        activity = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
            out = function(*args)
        del out
    events = profile.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max([0, *itertools.accumulate(size for _, size in steps)])


# --------------------------------------------------------------------------------------------
# A row


def measure(row: Case, name: str, *, threads: int | None = None, seconds: float = 0.25,
            peer: Peer | None = None, copy: CopyLoop | None = None,
            inputs: Sequence | None = None,
            peak_flops: float | None = None) -> tuple[Row, list[float]]:  # fmt: skip
    """Check a contender (not a yardstick), then time it. name: a backend, or that of `peer`.

    Returns the row and the seconds of each round. Raises RefusedError if the result is wrong.
    copy, inputs: a CopyLoop and what `rotated` returned, to be shared between rows.
    peak_flops: operations per second; where they bound more than the memory, they are the floor.
    """
    found = measure_together(
        row, {name: peer}, threads=threads, seconds=seconds, copy=copy, inputs=inputs,
        peak_flops=peak_flops,
    )[name]  # fmt: skip
    if isinstance(found, Exception):
        raise found
    return found


def measure_together(
    row: Case, contenders: dict[str, Peer | None], *, threads: int | None = None,
    seconds: float = 0.25, copy: CopyLoop | None = None, inputs: Sequence | None = None,
    peak_flops: float | None = None,
) -> dict[str, tuple[Row, list[float]] | Exception]:  # fmt: skip
    """`measure` of several contenders (None: a backend), timed in alternation. One whose check
    raised is left out, and the error, which the caller must raise, stands in place of its row."""
    threads = torch.get_num_threads() if threads is None else threads
    found, ready, verdicts = {}, {}, {}
    with _check.threads(threads):
        for name, peer in contenders.items():
            function = row.op.function if isinstance(row.op, Chain) else row.op
            if peer is not None:
                function = peer.function
            try:
                if peer is None or peer.checked:
                    verdicts[name] = verify(row, name, function, peer is not None)
            except (ImportError, RuntimeError) as error:  # it must not take the others with it
                found[name] = error
                continue
            call = functools.partial(function, **row.options)
            ready[name] = row.step(call) if name in verdicts else call
        copy = copy or CopyLoop(row.device)
        copy.start(row.floor[0])
        inputs = rotated(row.args, row.device) if inputs is None else inputs
        forced = {name: None if contenders[name] is not None else name for name in ready}
        seen = _times_together(
            [(ready[name], forced[name]) for name in ready], inputs, seconds, row.device, copy
        )
        for name, own in zip(ready, seen, strict=True):
            with backend(forced[name]):
                peak = peak_memory(ready[name], inputs[0], row.device)
            found[name] = (
                _row(row, name, contenders[name], threads, own, copy.bandwidth, peak_flops, peak,
                     verdicts.get(name)),
                own,
            )  # fmt: skip
    return found


def _row(row, name, peer, threads, seen, bandwidth, peak_flops, peak, verdict) -> Row:
    size, flops = row.floor
    p20, median, p80 = _percentiles(seen)
    floor = max(size / bandwidth, flops / peak_flops if peak_flops else 0.0)
    return Row(
        op=row.op.name, contender=name,
        kind="backend" if peer is None else "peer" if peer.checked else "yardstick",
        passes="forward + backward" if row.gradient else "forward",
        size=list(row.size), dtype=str(row.dtype).removeprefix("torch."), options=row.options,
        device=row.device, device_name=device_name(row.device), threads=threads,
        median=median, p20=p20, p80=p80, rounds=len(seen), bytes=size, flops=flops,
        bandwidth=bandwidth, floor=floor, share=floor / median, gbps=size / median / 1e9,
        peak_memory=peak, error=verdict.error if verdict else None,
        error_limit=verdict.limit if verdict else None,
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th, between the nearest ranks."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]
