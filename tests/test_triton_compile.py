"""Every Triton kernel compiled to machine code for three GPU generations, without a GPU.

The launchers themselves are run, on CPU tensors of the ops' own test sizes, with Triton's driver
replaced by one that only names a target: so the signatures, constants and alignments are those of
real calls, and no list of them has to be kept. Nothing is launched. Registers, spills and shared
memory are held to the limits in tests/<family>/kernel_limits.json.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from dashpot._backends import Kernel
from dashpot._dispatch import REGISTRY, Chain

ROOT = Path(__file__).resolve().parents[1]
CAPABILITIES = (80, 90, 100)
# {family: its source files}; a large family is a folder.
SOURCES = {
    path.stem: sorted(path.rglob("*.py")) if path.is_dir() else [path]
    for path in sorted((ROOT / "triton_kernels").iterdir())
    if path.stem[0] != "_" and (path.is_dir() or path.suffix == ".py")
}


class Target:
    """Stands where Triton's driver stands: names a target, has no device."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # each target has a cache of its own

    def get_current_stream(self, _device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """compiled(capability, function, *args): the kernels that function(*args) would launch."""
    import triton
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    def collect(capability, function, *args):
        kernels.clear()
        triton.runtime.driver.set_active(Target(capability))
        function(*args)
        return list(kernels)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", None)  # so that it is put back
    return collect


def usage_of(kernel, ptxas_usage) -> dict:
    """What ptxas says about a compiled kernel, with the shared memory that the launch asks for."""
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)[1]
    tool = get_ptxas(kernel.metadata.target.arch).path
    done = subprocess.run(
        [tool, "-v", f"-arch={arch}", "-o", "/dev/null", "-"],
        input=ptx, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    (usage,) = ptxas_usage(done.stderr).values()
    return {**usage, "shared": kernel.metadata.shared}


def launchers(family: str):
    """(op, kernel) of a family's ops that have a Triton kernel."""
    for op in REGISTRY.values():
        if op.family == family and not isinstance(op, Chain):
            kernel = op.kernel("triton")
            if isinstance(kernel, Kernel):
                yield op, kernel


def calls(op, launcher, capability: int):
    """Arguments to compile for: everything the tests call on sm_90, the largest test and the first
    benchmark on the others; float16 compiles like bfloat16."""
    largest = max(op.sizes["test"], key=lambda size: sum(t.numel() for t in tensors(op, size)))
    sizes = [*(op.sizes["test"] if capability == 90 else [largest]), op.sizes["bench"][0]]
    dtypes = [torch.float32, torch.bfloat16] if capability == 90 else [torch.float32]
    for dtype in launcher.dtypes.intersection(dtypes):
        for size in sizes:
            args = op.inputs(size, dtype, "cpu", 0)
            if launcher.supports is None or launcher.supports(*args) is None:
                yield args


def both_passes(op, launcher, args) -> None:
    """Forward and, if the launcher has one, backward. Nothing is launched: values mean nothing."""
    outputs = launcher.forward(*args)
    if launcher.backward is None:
        return
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.ones_like(output) for output in outputs]
    needs = [[args[i] is not None for i in op._slots]]
    source = {"arg": args, "out": outputs, "grad": grads, "needs": needs}
    launcher.backward(*[source[kind][i] for kind, i in op._plan.takes])


def tensors(op, size) -> list[torch.Tensor]:
    return op._flatten(op.inputs(size, torch.float32, "cpu", 0))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("family", SOURCES)
def test_resources(compiled, ptxas_usage, kernel_limits, family, capability):
    """Every @triton.jit function that a launcher starts was seen, within its limits."""
    seen = {}
    for op, launcher in launchers(family):
        for args in calls(op, launcher, capability):
            for kernel in compiled(capability, both_passes, op, launcher, args):
                if kernel.hash not in seen:
                    seen[kernel.hash] = kernel.metadata.name
                    usage = usage_of(kernel, ptxas_usage)
                    kernel_limits.check(family, kernel.metadata.name, usage)
    source = "".join(path.read_text() for path in SOURCES[family])
    assert set(seen.values()) == set(re.findall(r"^def (_\w+_kernel)\(", source, re.MULTILINE))


def test_a_target_without_device_compiles(compiled, ptxas_usage):
    """The machinery itself, by a kernel whose demands are known."""
    import triton
    import triton.language as tl

    @triton.jit
    def _normalise_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at)
        tl.store(y_ptr + at, x / tl.sum(x, 0))  # x waits for its sum

    def launch(x):
        _normalise_kernel[(1,)](x, torch.empty_like(x), BLOCK=x.numel(), num_warps=1)

    for capability in CAPABILITIES:
        (small,) = compiled(capability, launch, torch.ones(32))
        assert f"sm_{capability}" in small.asm["ptx"]
        small = usage_of(small, ptxas_usage)
        assert 0 < small["registers"] < 64 and small["spill"] == 0
    (large,) = compiled(90, launch, torch.ones(1 << 14))  # 512 numbers per thread
    assert usage_of(large, ptxas_usage)["spill"] > 0
