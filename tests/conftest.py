"""What every test shares: the backends under test, the cases made of them, poisoned memory, seeds.

A *case* is op x backend x device x dtype x size. Cases come from the ops' own declarations, so a
new op or kernel is tested without a line here. What cannot run in this process is not generated:

    cpp, reference   always
    emulator         always: the CUDA kernels executed on the CPU (tests/emulator/build.py)
    torch            always: what PyTorch itself has, where it takes the case
    triton           on CPU tensors where TRITON_INTERPRET=1 (`pytest -m triton`), else on a GPU
    cuda             on a GPU

and `test_layout.py` fails where a kernel in the sources has no case.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path

import dashpot
import hypothesis
import pytest
import torch
from dashpot import _check, _dispatch
from dashpot._backends import BACKENDS, ORDER, Backend, Kernel
from dashpot._dispatch import REGISTRY, Chain
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SOME_CALLS = ("triton", "torch")  # backends that may decline a call for its sizes
KERNEL_MARKS = ("triton", "emulator")  # backends that a process may select: pytest -m emulator


# --------------------------------------------------------------------------------------------
# Backends


@functools.cache
def _emulated():
    path = ROOT / "tests" / "emulator" / "build.py"
    spec = importlib.util.spec_from_file_location("dashpot_emulator_build", path)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build.load()


# The CUDA kernels, run on CPU tensors: chosen by hand only, never by the dispatcher.
BACKENDS["emulator"] = Backend("emulator", lambda family: _emulated(), ("cpu",), suffix="_cuda")


def pytest_configure(config):
    config.addinivalue_line("markers", "triton: runs a Triton kernel")
    config.addinivalue_line("markers", "emulator: runs a CUDA kernel on the CPU")
    config.addinivalue_line("markers", "peers: needs the libraries of requirements-peers.txt")
    config.addinivalue_line("markers", "absent: there is no such case in this process")
    config.addinivalue_line("markers", "cases(**selection): the cases a test takes")
    config.addinivalue_line("markers", "tests_op(name): the op whose backends `backend` stands for")
    config.addinivalue_line("markers", "backends(which): `backend` is a name, or any of kernels")
    torch.set_num_threads(1)  # small sums would only wait for each other; tests of threads set it
    hypothesis.settings.register_profile(
        "dashpot",
        derandomize=True,
        deadline=None,
        max_examples=25,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("dashpot")


# --------------------------------------------------------------------------------------------
# Cases


@dataclasses.dataclass(frozen=True, repr=False)
class Case:
    """An op on a backend, with what is needed to call it, differentiate it and know the truth."""

    op: _dispatch.Op | Chain
    backend: str
    device: str
    dtype: torch.dtype
    size: tuple

    @property
    def id(self) -> str:
        size = "x".join(map(str, self.size))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op.name}-{self.backend}-{self.device}-{dtype}-{size}"

    def __repr__(self) -> str:
        return self.id

    @property
    def ops(self) -> tuple[_dispatch.Op, ...]:
        return self.op.ops if isinstance(self.op, Chain) else (self.op,)

    @property
    def is_kernel(self) -> bool:
        return self.backend != "reference"

    @property
    def names(self) -> str:
        """For `dashpot.backend`; in a chain others serve the ops that have no kernel on it."""
        return self.and_others if isinstance(self.op, Chain) else self.backend

    @property
    def and_others(self) -> str:
        """This backend, then the dispatcher's order."""
        if not self.is_kernel:
            return self.backend
        return ",".join(dict.fromkeys((self.backend, *ORDER[self.device], "reference")))

    def forced(self):
        return dashpot.backend(self.names)

    def inputs(self, seed: int = 0, **changes) -> tuple:
        case = dataclasses.replace(self, **changes)
        return case.op.inputs(case.size, case.dtype, case.device, seed)

    def __call__(self, *args):
        with self.forced():
            return self.op(*args)

    def declined(self, args) -> str | None:
        """Why the backend cannot take this call; a chain's ops are asked when they run."""
        if isinstance(self.op, Chain):
            return None
        return self.op.reason(self.backend, self.op._flatten(args)[0], args)

    def differentiable_tensors(self, args) -> list[torch.Tensor]:
        if isinstance(self.op, Chain):
            return [t for t in tree_leaves(args) if _is_float(t)]
        return [t for i in self.op._plan.gives for t in tree_leaves(args[i]) if _is_float(t)]

    def as_function(self, args):
        """The call as a function of the tensors that have a gradient, and those tensors."""
        flat, spec = tree_flatten(args)
        wanted = {id(tensor) for tensor in self.differentiable_tensors(args)}
        places = [i for i, leaf in enumerate(flat) if id(leaf) in wanted]

        def function(*tensors):
            filled = list(flat)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            outputs = tree_leaves(self.op(*tree_unflatten(filled, spec)))
            return tuple(output for output in outputs if output.is_floating_point())

        return function, [flat[i] for i in places]

    def gradients(self, args) -> list[torch.Tensor]:
        """Gradients of the outputs, weighted unequally; empty if the op has none."""
        if not self.op.differentiable:
            return []
        function, tensors = self.as_function(args)
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        with self.forced():
            outputs = function(*tensors)
        return list(torch.autograd.grad(outputs, tensors, self.weights(outputs)))

    @staticmethod
    def weights(outputs) -> list[torch.Tensor]:
        """What the outputs are summed with: unequal weights, so that no entry hides another."""
        return [torch.linspace(1, 2, o.numel()).reshape(o.shape).to(o) for o in outputs]

    # The truth, by the one tolerance rule of dashpot._check.

    def expected(self, args=None, *, gradients: bool | None = None) -> _check.Expected:
        """What the reference gives in float64 for these arguments (default: the case's own)."""
        if args is None:
            return _expected(self.op.name, self.dtype, self.device, self.size)
        return _check.expect(self.op, args, gradients=gradients)

    def judge(self, outputs, args) -> None:
        """Fail unless these outputs of op(*args) keep the rule."""
        parts = {f"output {i}": part for i, part in enumerate(_check.flatten(outputs))}
        verdict = _check.judge(parts, self.expected(args, gradients=False))
        assert verdict.ok, str(verdict)


def _is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@functools.lru_cache(maxsize=256)
def _expected(name, dtype, device, size) -> _check.Expected:
    op = REGISTRY[name]
    return _check.expect(op, op.inputs(size, dtype, device, 0))


@functools.cache
def _elements(name: str, size: tuple) -> int:
    op = REGISTRY[name]
    return sum(
        leaf.numel()
        for leaf in tree_leaves(op.inputs(size, torch.float32, "cpu", 0))
        if isinstance(leaf, torch.Tensor)
    )


def _sizes(op, which: str) -> list[tuple]:
    """all; small: the least with 16 elements (gradcheck); large: the greatest."""
    sizes = op.sizes["test"]
    if which == "all":
        return sizes
    ordered = sorted(sizes, key=lambda size: _elements(op.name, size))
    if which == "large":
        return ordered[-1:]
    return [next((size for size in ordered if _elements(op.name, size) >= 16), ordered[-1])]


def _serves(op, backend: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a backend has a kernel for the op that takes this dtype (at the small size)."""
    size = _sizes(op, "small")[0]
    args = op.inputs(size, dtype, device, 0)
    first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
    own = first.dtype if first.is_floating_point() else torch.float32
    if own != dtype:
        return False  # an op of fixed dtype, whatever it is asked for: one case is enough
    if backend == "reference":
        return True
    if isinstance(op, Chain):
        return any(_serves(one, backend, device, dtype) for one in op.ops if backend != "reference")
    kernel = op.kernel(backend)
    return isinstance(kernel, Kernel) and kernel.declines(first, args) is None


@functools.cache
def _grid() -> tuple[Case, ...]:
    """Every op x backend x device x dtype of this process; size: the small one."""
    return tuple(
        Case(op, backend, device, dtype, _sizes(op, "small")[0])
        for op in REGISTRY.values()
        for backend in (*BACKENDS, "reference")
        for device in DEVICES
        for dtype in DTYPES
        if _serves(op, backend, device, dtype)
    )


def _selected(sizes="small", dtypes="all", backends="all", device=None, differentiable=False,
              kind="any") -> list[Case]:  # fmt: skip
    """The cases a test asks for with `@pytest.mark.cases(...)`.

    sizes: all, small, large. dtypes: all; one: float32, or what the op has. backends: all; kernels:
    without the reference; preferred: what the dispatcher would take; or one name. kind: op, chain.
    """
    cases = []
    for case in _grid():
        chain = isinstance(case.op, Chain)
        if (
            (kind == "any" or chain == (kind == "chain"))
            and _is_one_of(case, backends)
            and device in (None, case.device)
            and (case.op.differentiable or not differentiable)
            and _takes_dtype(case, dtypes)
        ):
            cases += [dataclasses.replace(case, size=size) for size in _sizes(case.op, sizes)]
    order = list(REGISTRY)  # backends last: neighbours share what is expected of them
    return sorted(cases, key=lambda case: (order.index(case.op.name), case.device,
                                           DTYPES.index(case.dtype), str(case.size)))  # fmt: skip


def _is_one_of(case: Case, backends: str) -> bool:
    if backends == "preferred":
        return case.backend in _preferred(case)
    if backends == "native":  # runs at full speed
        return case.backend == "cpp" or (case.device == "cuda" and case.is_kernel)
    return backends in ("all", case.backend) or (backends == "kernels" and case.is_kernel)


def _takes_dtype(case: Case, dtypes) -> bool:
    if dtypes == "all":
        return True
    if isinstance(dtypes, torch.dtype):
        return case.dtype == dtypes
    there = [one.dtype for one in _grid() if one.op is case.op and one.backend == case.backend]
    return case.dtype == (torch.float32 if torch.float32 in there else there[0])


def _preferred(case: Case) -> tuple[str, ...]:
    for name in (*ORDER[case.device], "reference"):
        if any(one.op is case.op and (one.backend, one.device) == (name, case.device)
               for one in _grid()):  # fmt: skip
            return (name,)
    return ()


def _with_mark(case: Case):
    mark = [getattr(pytest.mark, case.backend)] if case.backend in KERNEL_MARKS else []
    return pytest.param(case, marks=mark, id=case.id)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("cases")
        cases = _selected(**marker.kwargs)
    elif "backend" in metafunc.fixturenames or "backend64" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("tests_op")
        name = marker.args[0] if marker else metafunc.module.__name__.rsplit("test_", 1)[-1]
        dtype = torch.float64 if "backend64" in metafunc.fixturenames else torch.float32
        cases = [case for case in _grid() if case.op.name == name and case.dtype == dtype]
        if only := metafunc.definition.get_closest_marker("backends"):
            cases = [case for case in cases if _is_one_of(case, only.args[0])]
    else:
        return
    fixture = next(n for n in ("case", "backend", "backend64") if n in metafunc.fixturenames)
    params = [_with_mark(case) for case in cases]
    params = params or [pytest.param(None, marks=pytest.mark.absent, id="absent")]
    metafunc.parametrize(fixture, params, indirect=True)


def pytest_collection_modifyitems(config, items):
    absent = [item for item in items if item.get_closest_marker("absent")]
    items[:] = [item for item in items if not item.get_closest_marker("absent")]
    config.hook.pytest_deselected(items=absent)


@pytest.fixture
def case(request) -> Case:
    return request.param


@pytest.fixture
def backend(request):
    """A backend of the op that the file is named after (test_<op>.py), forced during the test.

    Triton kernels and PyTorch's functions serve the common case and decline the rest, which the
    next backend then takes; the others must take every call that they have a dtype for."""
    case = request.param
    with dashpot.backend(case.and_others if case.backend in SOME_CALLS else case.names):
        yield case


backend64 = backend  # the backends that take float64


@pytest.fixture(scope="session")
def grid() -> tuple[Case, ...]:
    return _grid()


# --------------------------------------------------------------------------------------------
# Memory and seeds


def _poisoned(make, log: set[int]):
    """`make`, whose memory is filled with what no kernel may leave: NaN, or the largest int."""

    @functools.wraps(make)
    def poisoned(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            tensor.detach().fill_(torch.nan)
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
        if type(tensor) is torch.Tensor and tensor.device.type != "meta":
            log.add(tensor.untyped_storage().data_ptr())
        return tensor

    return poisoned


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> set[int]:
    """Uninitialised memory is NaN, so an element that a kernel forgot cannot pass by luck.

    Yields the addresses that were handed out. C++ calls `new_empty` of its input, Triton launchers
    `torch.empty`: both look the name up in Python and get these.
    """
    log: set[int] = set()
    for owner, name in (
        (torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"),
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name), log))
    return log


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------
# What compiled GPU kernels ask for


def _ptxas_usage(report: str) -> dict[str, dict[str, int]]:
    """{function: {registers, spill, stack, shared}} from what `ptxas -v` prints; bytes."""
    found = {}
    for part in re.split(r"Compiling entry function '", report)[1:]:
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) ", part).groups(),
        )
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = {
            "registers": int(re.search(r"Used (\d+) registers", part)[1]),
            "spill": stores + loads,
            "stack": stack,
            "shared": int(shared[1]) if shared else 0,
        }
    return found


class _Limits:
    """tests/<family>/kernel_limits.json: {kernel: {registers, spill, stack, shared}}."""

    @functools.cache  # noqa: B019
    def of(self, family: str) -> dict[str, dict[str, int]]:
        return json.loads((ROOT / "tests" / family / "kernel_limits.json").read_text())

    def check(self, family: str, kernel: str, usage: dict[str, int]) -> None:
        limits = self.of(family)
        assert kernel in limits, f"kernel_limits.json of {family} says nothing of {kernel}"
        beyond = {
            name: f"{value} > {limits[kernel].get(name, 0)}"
            for name, value in usage.items()
            if value > limits[kernel].get(name, 0)
        }
        assert not beyond, f"{kernel} is beyond its limits: {beyond}"


@pytest.fixture(scope="session")
def ptxas_usage():
    return _ptxas_usage


@pytest.fixture(scope="session")
def kernel_limits() -> _Limits:
    return _Limits()
