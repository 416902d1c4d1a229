"""Every CUDA source compiled for three GPU generations, without a GPU.

nvcc is the one on PATH, else the one of the pip packages. Registers, spills, stack and shared
memory of each kernel are held to the limits in tests/<family>/kernel_limits.json.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = sorted(CSRC.rglob("*.cu"))
DEVICE = SOURCES + sorted(CSRC.rglob("*.cuh"))
PIP = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
PACKAGES = "nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl"


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc") or next(map(str, PIP.glob("cu*/bin/nvcc")), None)
    assert found, f"no nvcc on PATH; install the CUDA toolkit, or: pip install {PACKAGES}"
    return found


def usage_of(nvcc: str, source: Path, capability: int, folder: Path, ptxas_usage) -> dict:
    """{mangled kernel: usage}"""
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-I{CSRC}", f"-arch=sm_{capability}", "-Xptxas", "-v",
         "-Werror", "all-warnings", "-cubin", "-o", str(folder / "out.cubin"), str(source)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr
    return ptxas_usage(done.stdout + done.stderr)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_resources(nvcc, ptxas_usage, kernel_limits, tmp_path, source, capability):
    """Each __global__ function of the source was compiled, within its limits."""
    known = {name for path in DEVICE for name in kernels_in(path)}
    usage = usage_of(nvcc, source, capability, tmp_path, ptxas_usage)
    seen = {}
    for mangled, used in usage.items():
        name = max((name for name in known if f"{len(name)}{name}" in mangled), key=len)
        seen.setdefault(name, []).append(used)
    assert seen and seen.keys() >= kernels_in(source)
    for name, variants in seen.items():
        worst = {key: max(used[key] for used in variants) for key in variants[0]}
        kernel_limits.check(source.parent.name, name, worst)


def kernels_in(source: Path) -> set[str]:
    text = re.sub(r"//.*", "", source.read_text())
    bounds = r"(?:__launch_bounds__\([^;{]*?\)\s+)?"
    return set(re.findall(rf"__global__\s+void\s+{bounds}(\w+)\(", text))


@pytest.mark.parametrize("family", sorted({path.parent.name for path in SOURCES}))
def test_no_limit_without_a_kernel(kernel_limits, family):
    """Neither CUDA's, which start with a letter, nor Triton's, which start with an underscore."""
    kernels = {name for path in DEVICE if path.parent.name == family for name in kernels_in(path)}
    triton = ROOT / "triton_kernels"
    for path in (triton / f"{family}.py", *(triton / family).glob("*.py")):
        if path.exists():
            kernels |= set(re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert set(kernel_limits.of(family)) == kernels


def test_spills_are_seen(nvcc, ptxas_usage, tmp_path):
    """The machinery itself, by a kernel that is given too few registers."""
    source = tmp_path / "spill.cu"
    source.write_text("""
extern "C" __global__ void __launch_bounds__(1024, 2) hoard(const float* x, float* y) {
  __shared__ float shared[256];
  float value[128];
  for (int i = 0; i < 128; ++i) value[i] = x[i * blockDim.x + threadIdx.x];
  shared[threadIdx.x % 256] = value[0];
  __syncthreads();
  for (int i = 0; i < 128; ++i)
    for (int j = 0; j < 128; ++j) y[i * j] += value[i] * value[j] + shared[i];
}""")
    usage = usage_of(nvcc, source, 90, tmp_path, ptxas_usage)["hoard"]
    assert usage["registers"] <= 32
    assert usage["spill"] > 0
    assert usage["shared"] >= 1024
