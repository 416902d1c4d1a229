"""The dispatcher, by toy ops whose kernels are Python functions that note each call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import dashpot
import pytest
import torch
from dashpot import _arrays, _backends, _dispatch
from dashpot._backends import BACKENDS, Backend
from dashpot._dispatch import REGISTRY

SCALE = "(Tensor x, float factor) -> (Tensor y)"
SCALE_BACKWARD = "(Tensor grad_y, Tensor x, float factor) -> (Tensor grad_x)"


def _scale(x, factor):
    return x * factor


def _scale_backward(grad_y, x, factor):
    return grad_y * factor


@pytest.fixture
def library(monkeypatch):
    """A library of its own, so that nothing of the toys outlives the test."""
    own = torch.library.Library("dashpot", "FRAGMENT")
    monkeypatch.setattr(_dispatch, "_LIBRARY", own)
    before = dict(REGISTRY)
    yield own
    REGISTRY.clear()
    REGISTRY.update(before)
    own._destroy()


@pytest.fixture
def calls():
    """(backend, part) of every kernel call."""
    return []


@pytest.fixture
def backends(monkeypatch, calls):
    """Two backends for CPU tensors, quick before slow. quick declines float16 by its dtypes and a
    factor of 0 by `scale_supports`; slow has no backward of its own."""

    def kernel(name, part, function):
        def run(*args):
            calls.append((name, part))
            return function(*args)

        return run

    quick = SimpleNamespace(
        __name__="toy.quick",
        scale_forward=kernel("quick", "forward", _scale),
        scale_backward=kernel("quick", "backward", _scale_backward),
        scale_supports=lambda x, factor: None if factor else "factor must not be 0",
    )
    slow = SimpleNamespace(
        __name__="toy.slow", scale_forward_slow=kernel("slow", "forward", _scale)
    )
    dtypes = frozenset((torch.float32, torch.float64))
    toys = {
        "quick": Backend("quick", lambda _: quick, ("cpu",), dtypes=dtypes),
        "slow": Backend("slow", lambda _: slow, ("cpu",), suffix="_slow"),
    }
    monkeypatch.setattr(_backends, "BACKENDS", toys)
    monkeypatch.setattr(_dispatch, "BACKENDS", toys)
    monkeypatch.setattr(_dispatch, "ORDER", {"cpu": ("quick", "slow")})
    return SimpleNamespace(quick=quick, slow=slow)


def declare(name="scale", forward=SCALE, backward=SCALE_BACKWARD, **changes):
    options = {
        "reference": _scale,
        "reference_backward": _scale_backward,
        "inputs": lambda size, dtype, device, seed: (torch.ones(size, dtype=dtype), 2.0),
        "floor": lambda x, factor: (2 * x.numel() * x.element_size(), x.numel()),
        "sizes": {"test": [(3,)], "bench": [(3,)]},
    }
    return _dispatch.declare(name, forward=forward, backward=backward, **{**options, **changes})


@pytest.fixture
def scale(library, backends):
    return declare()


X = torch.arange(3.0)


# --------------------------------------------------------------------------------------------
# The choice


def test_order(scale, calls):
    """First the first backend that takes the call, then the next, then the reference."""
    scale(X, 2.0)
    scale(X.half(), 2.0)
    assert calls == [("quick", "forward"), ("slow", "forward")]
    assert scale(X.to("meta"), 2.0).device.type == "meta"
    assert len(calls) == 2


def test_supports_decides_before_the_call(scale, calls):
    scale(X, 0.0)
    assert calls == [("slow", "forward")]


def test_prefer_goes_first(library, backends, calls):
    declare(prefer="slow")(X, 2.0)
    assert calls == [("slow", "forward")]


def test_a_kernel_exists_when_its_function_does(library, backends, calls):
    del backends.quick.scale_forward
    scale = declare()
    scale(X, 2.0)
    assert calls == [("slow", "forward")]
    assert scale.kernel("quick") == "not built: no scale_forward in toy.quick"


def test_a_backend_that_cannot_be_imported_says_why(library, backends, monkeypatch, calls):
    def missing(_family):
        raise ImportError("no such module")

    monkeypatch.setitem(_dispatch.BACKENDS, "quick", Backend("quick", missing, ("cpu",)))
    scale = declare()
    assert scale.kernel("quick") == "not built: no such module"
    scale(X, 2.0)
    assert calls == [("slow", "forward")]


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, ImportError, ValueError])
def test_an_error_in_a_kernel_is_an_error(library, backends, calls, error):
    """Nothing else is tried after a kernel was chosen."""

    def broken(x, factor):
        raise error("inside the kernel")

    backends.quick.scale_forward = broken
    with pytest.raises(error, match="inside the kernel"):
        declare()(X, 2.0)
    assert calls == []


def test_an_error_in_supports_is_an_error(library, backends):
    def broken(x, factor):
        raise RuntimeError("inside supports")

    backends.quick.scale_supports = broken
    with pytest.raises(RuntimeError, match="inside supports"):
        declare()(X, 2.0)


# --------------------------------------------------------------------------------------------
# By hand


def test_forced(scale, calls):
    with dashpot.backend("slow"):
        scale(X, 2.0)
        with dashpot.backend("quick"):
            scale(X, 2.0)
        with dashpot.backend(None):
            scale(X, 2.0)
        scale(X, 2.0)
    scale(X, 2.0)
    assert [name for name, _ in calls] == ["slow", "quick", "quick", "slow", "quick"]
    with dashpot.backend("reference"):
        assert torch.equal(scale(X, 2.0), 2 * X)
    assert len(calls) == 5


def test_forced_list_is_tried_in_order(scale, calls):
    with dashpot.backend("quick, slow"):
        scale(X, 2.0)
        scale(X.half(), 2.0)
    with dashpot.backend("slow,quick"):
        scale(X, 2.0)
    with dashpot.backend("quick,reference"):
        scale(X.half(), 2.0)
    assert [name for name, _ in calls] == ["quick", "slow", "slow"]


def test_a_choice_that_cannot_be_met_raises(scale, calls):
    with dashpot.backend("quick"), pytest.raises(RuntimeError) as error:
        scale(X.half(), 2.0)
    assert "scale cannot run" in str(error.value) and "quick: has no kernel" in str(error.value)
    with dashpot.backend("quick"), pytest.raises(RuntimeError, match="factor must not be 0"):
        scale(X, 0.0)
    with dashpot.backend("quick,slow"), pytest.raises(RuntimeError) as error:
        scale(X.to("meta"), 2.0)
    assert "quick: needs a tensor on cpu" in str(error.value)
    assert "slow: needs a tensor on cpu, got meta" in str(error.value)
    assert calls == []


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend: expected one of cpp, .*got 'fast'"):
        dashpot.backend("cpp,fast").__enter__()


def test_forced_backend_ends_with_its_block(scale, calls):
    with pytest.raises(KeyError), dashpot.backend("slow"):
        raise KeyError
    scale(X, 2.0)
    assert calls == [("quick", "forward")]


def run(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_environment_variable():
    code = """
import dashpot, torch
x = torch.ones(2, 3)
print(dashpot.explain(dashpot.gram, x).chosen["gram"])
with dashpot.backend(None):
    print(dashpot._backends._forced.get())
"""
    assert run(code, DASHPOT_BACKEND="reference").stdout.split() == ["reference", "None"]
    wrong = run(code, DASHPOT_BACKEND="fast")
    assert wrong.returncode and "backend: expected one of" in wrong.stderr
    assert "got 'fast'" in wrong.stderr


# --------------------------------------------------------------------------------------------
# explain


def test_explain(scale, calls):
    explanation = dashpot.explain(scale, X, 0.0)
    assert explanation.rows == [
        ("scale", "quick", "factor must not be 0"),
        ("scale", "slow", "chosen"),
        ("scale", "reference", "can run"),
    ]
    assert explanation.chosen == {"scale": "slow"}
    assert calls == [("slow", "forward")]
    assert [line.split()[1] for line in str(explanation).splitlines()] == [
        "quick",
        "slow",
        "reference",
    ]


def test_explain_within_a_forced_backend(scale):
    with dashpot.backend("slow"):
        rows = dashpot.explain(scale, X, 2.0).rows
    assert rows[1] == ("scale", "slow", "chosen (by hand)") and rows[0][2] == "can run"


def test_explain_a_chain():
    explanation = dashpot.explain(dashpot.flag_aggregate, torch.randn(4, 50))
    assert list(explanation.chosen) == ["gram", "flag_coeffs", "combine"]
    assert {name for _, name, _ in explanation.rows} == {*BACKENDS, "reference"}


def test_explain_leaves_no_trace_after_an_error(scale, calls):
    with pytest.raises(TypeError):
        dashpot.explain(dashpot.gram, 3)
    assert _backends._forced.get() is None


# --------------------------------------------------------------------------------------------
# Gradients


def test_the_backward_of_the_chosen_backend_runs(scale, calls):
    x = X.clone().requires_grad_()
    scale(x, 2.0).sum().backward()
    assert calls == [("quick", "forward"), ("quick", "backward")]
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_a_backend_without_backward_uses_the_formula(scale, calls):
    x = X.clone().requires_grad_()
    with dashpot.backend("slow"):
        scale(x, 2.0).sum().backward()
    assert calls == [("slow", "forward")]
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_the_backend_of_the_forward_serves_the_backward(scale, calls):
    """Even when the choice has changed in between."""
    x = X.clone().requires_grad_()
    y = scale(x, 2.0).sum()
    with dashpot.backend("reference"):
        y.backward()
    assert calls == [("quick", "forward"), ("quick", "backward")]


def test_kernels_get_contiguous_tensors(scale, backends):
    """The gradient of a sum is one number, expanded; torch.ops takes any strides."""
    strides = []

    def noted(tensor, *args):
        strides.append(tensor.stride())
        return tensor * args[-1]

    backends.quick.scale_forward = backends.quick.scale_backward = noted
    with dashpot.backend("quick"):
        scale(X.clone().requires_grad_(), 2.0).sum().backward()
        y = torch.ops.dashpot.scale_forward(X.reshape(3, 1).expand(3, 2), 2.0)
    assert torch.equal(y, 2 * X[:, None].expand(3, 2))
    assert strides == [(1,), (1,), (2, 1)]


@pytest.fixture
def root(library, backends, calls):
    """y = sqrt(x), whose backward reads y: a residual."""
    backends.quick.root_forward = lambda x: (calls.append("forward"), x.sqrt())[1]
    return declare(
        "root",
        forward="(Tensor x) -> (Tensor y)",
        backward="(Tensor grad_y, Tensor y) -> (Tensor grad_x)",
        reference=torch.sqrt,
        reference_backward=lambda grad_y, y: grad_y / (2 * y),
    )


def test_second_derivative_of_an_op_with_residuals_is_refused(root, calls):
    x = torch.tensor([4.0], requires_grad=True)
    (grad,) = torch.autograd.grad(root(x), x)
    assert grad.item() == 0.25
    with pytest.raises(
        RuntimeError, match=r"root has no second derivative on backend 'quick'.*refer"
    ):
        torch.autograd.grad(root(x), x, create_graph=True)
    with dashpot.backend("reference"):
        (grad,) = torch.autograd.grad(root(x), x, create_graph=True)
        (second,) = torch.autograd.grad(grad, x)
    assert second.item() == -1 / 32


def test_second_derivative_of_an_op_without_residuals(scale, calls):
    """x enters linearly; what is differentiated twice is the incoming gradient."""
    x = X.clone().requires_grad_()
    y = scale(x, 3.0)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # 2 * 9 * x
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert torch.equal(second, torch.full((3,), 18.0))


def test_residuals_stay_inside(library, backends):
    """public=1: the caller gets the first output, the backward the second."""
    backends.quick.cube_forward = lambda x: (x**3, 3 * x**2)
    cube = declare(
        "cube",
        forward="(Tensor x) -> (Tensor y, Tensor slope)",
        backward="(Tensor grad_y, Tensor slope) -> (Tensor grad_x)",
        reference=lambda x: (x**3, 3 * x**2),
        reference_backward=lambda grad_y, slope: grad_y * slope,
        public=1,
    )
    for name in ("quick", "reference"):
        x = torch.tensor([2.0], requires_grad=True)
        with dashpot.backend(name):
            y = cube(x)
            assert isinstance(y, torch.Tensor) and y.item() == 8
            y.backward()
        assert x.grad.item() == 12


def test_an_op_without_gradient(library, backends):
    backends.quick.count_forward = lambda x: (x > 0).sum()
    count = declare(
        "count",
        forward="(Tensor x) -> (Tensor n)",
        backward=None,
        reference=lambda x: (x > 0).sum(),
    )
    assert not count.differentiable
    assert not count(X.clone().requires_grad_()).requires_grad


def test_functional_transforms_only_by_the_reference(scale, calls):
    assert torch.equal(torch.func.vmap(lambda x: scale(x, 2.0))(X[None])[0], 2 * X)
    assert calls == []
    with (
        dashpot.backend("quick"),
        pytest.raises(RuntimeError, match=r"torch\.func.*quick was asked"),
    ):
        torch.func.vmap(lambda x: scale(x, 2.0))(X[None])
    rows = dashpot.explain(torch.func.vmap(lambda x: scale(x, 2.0)), X[None]).rows
    assert rows[-1][:2] == ("scale", "reference") and "torch.func" in rows[-1][2]


# --------------------------------------------------------------------------------------------
# Subclasses


class Logged(torch.Tensor):
    """Sees every op that is called on it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_a_subclass_sees_the_registered_op(scale, calls):
    Logged.seen.clear()
    y = scale(X.as_subclass(Logged), 2.0)
    assert type(y) is Logged
    assert "dashpot.scale_forward.default" in Logged.seen
    assert calls == [("quick", "forward")]


def test_a_parameter_is_a_plain_tensor(scale, calls):
    scale(torch.nn.Parameter(X.clone()), 2.0).sum().backward()
    assert calls == [("quick", "forward"), ("quick", "backward")]


# --------------------------------------------------------------------------------------------
# Arrays of other libraries


class Array:
    """The least that an array of the standard must have; it holds a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self, api_version=None):
        return Array

    @classmethod
    def from_dlpack(cls, other):
        return cls(torch.from_dlpack(other))


def test_arrays_in_and_out():
    """The caller's kind comes back, for single arrays, lists, keyword arguments and tuples."""
    rows = torch.randn(3, 8, dtype=torch.float64)
    k = dashpot.gram(Array(rows))
    assert isinstance(k, Array)
    torch.testing.assert_close(k.tensor, rows @ rows.mT)
    assert isinstance(dashpot.gram([Array(row.clone()) for row in rows]), Array)
    lists = [[Array(row[:3].clone()), Array(row[3:].clone())] for row in rows]
    update, info = dashpot.flag_aggregate(lists, return_info=True)
    assert [type(part) for part in update] == [Array, Array]
    assert isinstance(info, dashpot.FlagInfo) and isinstance(info.v, Array)
    assert isinstance(dashpot.gram(grads=Array(rows)), Array)


def test_numpy_shares_memory():
    rows, out = torch.randn(3, 8).numpy(), torch.zeros(8).numpy()
    coeffs = torch.ones(3).numpy()
    result = dashpot.combine(rows, coeffs, out=out)
    assert type(result) is type(rows)
    assert result.ctypes.data == out.ctypes.data
    assert abs(out - rows.sum(0)).max() < 1e-6
    seen = []
    spy = _arrays.public(lambda x: seen.append(x.data_ptr()) or x)
    back = spy(rows)
    assert seen == [rows.ctypes.data] and back.ctypes.data == rows.ctypes.data


def test_tensors_stay_tensors():
    assert isinstance(dashpot.gram(torch.ones(2, 3)), torch.Tensor)
    assert isinstance(dashpot.gram([torch.ones(3)]), torch.Tensor)


# --------------------------------------------------------------------------------------------
# Threads


def test_one_openmp_runtime():
    """The compiled module works in torch's pool of threads; two pools would fight for the cores."""
    code = """
import dashpot, torch
with dashpot.backend("cpp"):
    dashpot.gram(torch.randn(15, 100_000))
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/" in line})
"""
    done = run(code)
    assert not done.returncode, done.stderr
    files = [os.path.basename(path) for path in done.stdout.split()]
    assert any(name.startswith("_C") for name in files)
    assert len([name for name in files if re.match(r"lib(gomp|iomp5|omp)\b", name)]) == 1


@pytest.mark.parametrize("count", [1, 2])
def test_threads_follow_torch(count):
    """As many threads as torch.set_num_threads says, whatever OMP_NUM_THREADS was."""
    code = f"""
import os, dashpot, torch
torch.set_num_threads(1)
rows = torch.ones(15, 300_000)
before = len(os.listdir("/proc/self/task"))
torch.set_num_threads({count})
with dashpot.backend("cpp"):
    dashpot.gram(rows)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = run(code, OMP_NUM_THREADS="4")
    assert done.stdout.split() == [str(count - 1)], done.stderr
