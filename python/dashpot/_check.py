"""The tolerance rule of the library, and `python -m dashpot check`.

Three-way rule: a kernel's error may be at most FACTOR times the error that eager PyTorch (the
reference at the kernel's dtype) makes on the same inputs, plus SLACK roundings. The truth is the
reference in float64 on those inputs. An error is max |got - truth| / max |truth| of one output.
Tests, benchmarks and the command line all ask `compare`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dashpot._backends import BACKENDS, ORDER, backend
from dashpot._dispatch import REGISTRY, Chain, Op
from dashpot._explain import explain

FACTOR = 4.0
SLACK = 2.0  # roundings of the output's dtype
WORK_SLACK = {torch.float64: 64.0, torch.float32: 8.0}  # roundings of the dtype of the sums
# How far inputs move for another draw of the rounding errors, in roundings. In float64 that stands
# for eager PyTorch's error itself: a stable solve of order p is exact for a problem that lies
# within about p roundings of the posed one, and ops declare orders up to 60.
_MOVE = {torch.float64: 64.0}
_MOVE_NARROW = 4.0
_MANY = 1 << 20  # input elements beyond which one draw of the roundings stands for all
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Verdict:
    """What `compare` found; the numbers are those of the worst output or gradient, `part`.

    trivial: every expected value is 0 (or there is none), so that the inputs test little.
    """

    ok: bool
    error: float
    eager_error: float
    limit: float
    part: str = ""
    why: str = ""
    trivial: bool = False

    def __str__(self) -> str:
        if self.why:
            return self.why
        return (
            f"{self.part}: error {self.error:.2e}, limit {self.limit:.2e} "
            f"(eager PyTorch {self.eager_error:.2e})"
        )


@dataclass
class Expected:
    """The truth for a call, and how far eager PyTorch is from it. Parts: outputs, gradients."""

    truth: dict[str, Tensor | None]
    eager: dict[str, Tensor | None]
    eager_error: dict[str, float]
    slack: dict[str, float]
    cotangents: list[Tensor] | None = None  # one per output that carries a gradient
    finite_inputs: bool = True


# --------------------------------------------------------------------------------------------
# Calls


def flatten(values) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from flatten(value)


def map_tensors(function: Callable[[Tensor], Tensor], values):
    """Nested lists and tuples with every tensor replaced by function(tensor)."""
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, list | tuple):
        return (
            tuple(map_tensors(function, value) for value in values)
            if isinstance(values, tuple)
            else [map_tensors(function, value) for value in values]
        )
    return values


def _on_floats(function: Callable[[Tensor], Tensor], args):
    return map_tensors(lambda x: function(x) if x.is_floating_point() else x, args)


def call(op: Op | Chain, name: str | None, args: Sequence, options: dict | None = None):
    """`op(*args)` on a backend; None leaves the choice to the dispatcher."""
    function = op.function if isinstance(op, Chain) else op
    with backend(name):
        return function(*args, **(options or {}))


def _parts(run: Callable, args, cotangents, gradients: bool) -> dict[str, Tensor | None]:
    """Every output of run(args) by name and, if asked for, the gradient of every float input."""
    with torch.no_grad():
        parts = {f"output {i}": out for i, out in enumerate(flatten(run(args)))}
    if not gradients:
        return parts
    leaves = _on_floats(lambda x: x.detach().clone().requires_grad_(), args)
    inputs = [x for x in flatten(leaves) if x.requires_grad]
    outputs = [out for out in flatten(run(leaves)) if out.requires_grad]
    grads = torch.autograd.grad(
        outputs, inputs, [c.to(out.dtype) for c, out in zip(cotangents, outputs, strict=True)],
        allow_unused=True,
    )  # fmt: skip
    parts.update({f"gradient {i}": grad for i, grad in enumerate(grads)})
    return parts


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------
# The rule


def error_of(got: Tensor, truth: Tensor) -> float:
    """max |got - truth| / max |truth|; inf where only one is NaN, or the infinities differ."""
    if truth.numel() == 0:
        return 0.0
    if not truth.is_floating_point():
        return 0.0 if torch.equal(got, truth) else math.inf
    got, truth = got.double(), truth.double()
    same = (got == truth) | (got.isnan() & truth.isnan())
    gap = (
        torch.where(same, 0.0, (got - truth).abs())
        .nan_to_num(nan=math.inf, posinf=math.inf)
        .max()
        .item()
    )
    size = truth.where(truth.isfinite(), 0.0).abs().max().item()
    return gap / size if size > 0 else gap


def _jittered(args, seed: int):
    """The inputs, each entry moved by a few roundings: another draw of the rounding errors."""
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) * 2 - 1
        size = _MOVE.get(x.dtype, _MOVE_NARROW) * torch.finfo(x.dtype).eps
        step = 1 + size * noise.to(x.device)
        return (x.double() * step).to(x.dtype)

    return _on_floats(move, args)


def _errors(parts: dict, truth: dict) -> dict[str, float]:
    return {
        name: error_of(parts[name], want) if want is not None else 0.0
        for name, want in truth.items()
    }


def expect(
    op: Op | Chain,
    args: Sequence,
    options: dict | None = None,
    *,
    gradients: bool | None = None,
    samples: int | None = None,
) -> Expected:
    """The truth for op(*args), and eager PyTorch's error, both from the reference.

    gradients: default, if the op has any. samples: how many draws of the rounding errors eager
    PyTorch gets (default 4; 1 for large inputs); its largest error counts, so that one lucky
    rounding does not set the limit. In float64, where eager PyTorch *is* the truth, its error is
    how far the truth moves when the inputs move by a few roundings, twice: the truth is rounded
    there as well as what is compared with it.
    """
    gradients = op.differentiable if gradients is None else gradients
    floats = [x for x in flatten(args) if x.is_floating_point()]
    small = sum(x.numel() for x in floats) <= _MANY
    with threads(1 if small else torch.get_num_threads()):  # small sums only wait for each other
        return _expect(op, args, options, gradients, samples or (4 if small else 1), floats)


def _expect(op, args, options, gradients: bool, samples: int, floats: list[Tensor]) -> Expected:
    coarsest = max(
        (x.dtype for x in floats), key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64
    )

    def run(values):
        return call(op, "reference", values, options)

    def truth_of(values):
        return _parts(run, _on_floats(Tensor.double, values), cotangents, gradients)

    cotangents = _cotangents(run, args) if gradients else None
    truth = truth_of(args)
    eager = _parts(run, args, cotangents, gradients)
    errors = _errors(eager, truth)
    for seed in range(1, samples):
        moved = _jittered(args, seed)
        target = truth if coarsest == torch.float64 else truth_of(moved)
        sample = _errors(_parts(run, moved, cotangents, gradients), target)
        # An exact comparison (integers, NaN) must not be widened by inputs that were moved.
        errors = {
            part: max(error, sample[part]) if math.isfinite(sample[part]) else error
            for part, error in errors.items()
        }
    if coarsest == torch.float64:
        errors = {part: 2 * error for part, error in errors.items()}
    finite = all(bool(torch.isfinite(x).all()) for x in floats)
    return Expected(truth, eager, errors, _slack(eager, coarsest), cotangents, finite)


def _slack(eager: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, float]:
    """dtype: the coarsest of the inputs'. Sums are formed in float32 at least."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    floor = WORK_SLACK[work] * torch.finfo(work).eps
    return {
        part: max(SLACK * torch.finfo(value.dtype).eps, floor)
        if value is not None and value.is_floating_point()
        else 0.0
        for part, value in eager.items()
    }


def _cotangents(run: Callable, args) -> list[Tensor]:
    leaves = _on_floats(lambda x: x.detach().clone().requires_grad_(), args)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        for out in flatten(run(leaves))
        if out.requires_grad
    ]


def compare(
    op: Op | Chain,
    name: str,
    args: Sequence,
    options: dict | None = None,
    *,
    gradients: bool | None = None,
    expected: Expected | None = None,
) -> Verdict:
    """Run op(*args, **options) on backend `name` and judge outputs and gradients.

    expected: what `expect` returned for the same call, to be shared between backends.
    """
    expected = expected or expect(op, args, options, gradients=gradients)
    got = _parts(
        lambda values: call(op, name, values, options),
        args, expected.cotangents, expected.cotangents is not None,
    )  # fmt: skip
    return judge(got, expected)


def judge(got: dict[str, Tensor | None], expected: Expected) -> Verdict:
    """The rule on parts that were computed already."""
    reason = _mismatch(got, expected)
    if reason:
        return Verdict(False, math.inf, 0.0, 0.0, why=reason)
    wanted = [want for want in expected.truth.values() if want is not None]
    trivial = all(bool((want == 0).all()) for want in wanted)
    worst = None
    for part, error in _errors(got, expected.truth).items():
        eager = expected.eager_error[part]
        # An eager result that overflowed says nothing of what a kernel may do.
        limit = (FACTOR * eager if math.isfinite(eager) else 0.0) + expected.slack[part]
        # Nearest to its limit, or furthest beyond it; 0 <= 0 is an exact match.
        share = error / limit if limit > 0 else math.inf if error > 0 else 0.0
        if worst is None or share > worst[0]:
            worst = share, Verdict(error <= limit, error, eager, limit, part, trivial=trivial)
    return worst[1]


def compare_values(got, eager, truth, dtype: torch.dtype) -> Verdict:
    """The rule on three results at hand: a kernel's, eager PyTorch's at `dtype`, the truth.

    Eager PyTorch has one draw of the rounding errors here; `compare` gives it several.
    """
    named = [
        {f"output {i}": part for i, part in enumerate(flatten(values))}
        for values in (got, eager, truth)
    ]
    if named[1].keys() != named[2].keys():
        raise ValueError(f"eager: expected {len(named[2])} tensors as truth, got {len(named[1])}")
    errors = _errors(named[1], named[2])
    return judge(
        named[0], Expected(named[2], named[1], errors, _slack(named[1], dtype), None, False)
    )


def _mismatch(got: dict, expected: Expected) -> str:
    """What is wrong before any number is compared."""
    if not expected.truth:
        return "the op returned no tensor"
    if got.keys() != expected.eager.keys():
        return f"expected {len(expected.eager)} outputs and gradients, got {len(got)}"
    for part, want in expected.eager.items():
        have = got[part]
        if (want is None) != (have is None):
            return f"{part}: expected {'none' if want is None else 'one'}"
        if want is None:
            continue
        if (have.shape, have.dtype, have.device) != (want.shape, want.dtype, want.device):
            return (
                f"{part}: expected {tuple(want.shape)} {want.dtype} on {want.device}, "
                f"got {tuple(have.shape)} {have.dtype} on {have.device}"
            )
        truth = expected.truth[part]
        if expected.finite_inputs and not bool(torch.isfinite(truth).all()):
            return f"{part}: the expected values are not finite though the inputs are"
    return ""


# --------------------------------------------------------------------------------------------
# Which backends can take a call


def reasons(op: Op | Chain, args: Sequence, options: dict | None = None) -> dict[str, str | None]:
    """{backend: why it cannot take op(*args), or None}; a chain can if each of its ops can."""
    names = (*BACKENDS, "reference")
    if isinstance(op, Op):
        first = next(flatten(args))
        return {name: op.reason(name, first, args) for name in names}
    result: dict[str, str | None] = dict.fromkeys(names)
    with backend(None):
        rows = explain(op.function, *args, **(options or {})).rows
    for part, name, verdict in rows:
        if verdict != "can run" and not verdict.startswith("chosen") and result[name] is None:
            result[name] = f"{part}: {verdict}"
    return result


def contenders(op: Op | Chain, args: Sequence, options: dict | None = None) -> list[str]:
    """The backends that can take op(*args). For a chain, an entry may name several in order
    ("triton,cuda"), where one of them does not have all of its ops."""
    device = next(flatten(args)).device.type
    found = [name for name, reason in reasons(op, args, options).items() if reason is None]
    if isinstance(op, Op):
        return found
    with backend(None):
        rows = explain(op.function, *args, **(options or {})).rows
    able = {(part, name) for part, name, verdict in rows if verdict.startswith(("can", "chosen"))}
    parts = dict.fromkeys(part for part, _, _ in rows)
    order = [name for name in BACKENDS if any((part, name) in able for part in parts)]
    order.sort(key=lambda name: name not in ORDER.get(device, ()))
    mixed = []
    for lead in order:
        if lead in found:
            continue
        chain = (lead, *(name for name in order if name != lead), "reference")
        used = {next(name for name in chain if (part, name) in able) for part in parts}
        mixed.append(",".join(name for name in chain if name in used))
    return [*(name for name in found if name != "reference"), *dict.fromkeys(mixed), "reference"]


# --------------------------------------------------------------------------------------------
# python -m dashpot check


@dataclass
class Row:
    """One op on one backend and dtype, over all test sizes."""

    op: str
    backend: str
    device: str
    dtype: str
    verdicts: list[tuple[tuple, Verdict]] = field(default_factory=list)  # (size, verdict)

    @property
    def trivial(self) -> bool:
        """Most sizes expect zeros only: a kernel that writes zeros would pass."""
        return 2 * sum(verdict.trivial for _, verdict in self.verdicts) > len(self.verdicts)

    @property
    def ok(self) -> bool:
        return all(verdict.ok for _, verdict in self.verdicts) and not self.trivial

    @property
    def worst(self) -> tuple[tuple, Verdict]:
        def share(entry):
            verdict = entry[1]
            if not verdict.ok:
                return math.inf
            return verdict.error / verdict.limit if verdict.limit > 0 else 0.0

        return max(self.verdicts, key=share)

    def cells(self) -> tuple[str, ...]:
        size, verdict = self.worst
        label = "ok" if self.ok else "FAILED"
        note = "" if verdict.ok else f"size {size}: {verdict}"
        if self.trivial:
            note = "most test sizes expect zeros only"
        return (
            self.op, self.backend, self.device, self.dtype, str(len(self.verdicts)),
            f"{verdict.error:.1e}", f"{verdict.eager_error:.1e}", f"{verdict.limit:.1e}",
            f"{label} {note}".strip(),
        )  # fmt: skip

    def as_dict(self) -> dict:
        return {
            "op": self.op, "backend": self.backend, "device": self.device, "dtype": self.dtype,
            "ok": self.ok, "sizes": [
                {"size": list(size), **vars(verdict), "text": str(verdict)}
                for size, verdict in self.verdicts
            ],
        }  # fmt: skip


HEADERS = ("op", "backend", "device", "dtype", "sizes", "error", "eager error", "limit", "result")


QUICK = 6  # sizes: tiles and blocks, whole and in part


def cases(
    op: Op | Chain, kind: str, device: str, quick: bool = False
) -> Iterator[tuple[tuple, torch.dtype]]:
    """(size, dtype) of an op's declared sizes; an op that fixes its dtype comes once."""
    first = op.sizes["test"][0]
    for dtype in _DTYPES:
        args = op.inputs(first, dtype, torch.device(device), 0)
        floats = {x.dtype for x in flatten(args) if x.is_floating_point()} or {torch.float32}
        if dtype in floats:
            for size in op.sizes[kind][: QUICK if quick else None]:
                yield size, dtype


def check(
    ops: Sequence[str], devices: Sequence[str], rows: dict, step: Callable, *,
    only: str | None = None, quick: bool = False,
) -> None:  # fmt: skip
    """Fill rows {(op, backend, device, dtype): Row}; filled as it goes, so that an interruption
    leaves what was found. only: the one backend to check; quick: the first sizes alone."""
    for name in ops:
        op = REGISTRY[name]
        for device in devices:
            for size, dtype in cases(op, "test", device, quick):
                step(f"{name} {dtype} {size}")
                _check_one(op, size, dtype, device, rows, only)


def _check_one(
    op: Op | Chain, size: tuple, dtype: torch.dtype, device: str, rows: dict, only: str | None
) -> None:
    args = op.inputs(size, dtype, torch.device(device), 0)
    names = [name for name in contenders(op, args) if only in (None, name)]
    expected = expect(op, args) if names else None
    for name in names:
        try:
            verdict = compare(op, name, args, expected=expected)
        except RuntimeError as error:  # what torch and CUDA raise: shown and counted as a failure
            verdict = Verdict(False, math.inf, 0.0, 0.0, why=f"{type(error).__name__}: {error}")
        key = (op.name, name, device, str(dtype).removeprefix("torch."))
        rows.setdefault(key, Row(*key)).verdicts.append((size, verdict))


def count(ops: Sequence[str], kind: str, devices: Sequence[str], quick: bool = False) -> int:
    return sum(
        1 for name in ops for device in devices for _ in cases(REGISTRY[name], kind, device, quick)
    )
