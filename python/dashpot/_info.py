"""What machine and installation this is: `python -m dashpot info`, and the head of results."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import dashpot
from dashpot._backends import BACKENDS
from dashpot._check import reasons
from dashpot._dispatch import REGISTRY, Op


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def default_device() -> str:
    return devices()[-1]


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else _cpu_name()


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _compiled_attribute(name: str, missing):
    """What a function of dashpot._C returns; `missing` without the module or the function."""
    if importlib.util.find_spec("dashpot._C") is None:
        return missing
    function = getattr(importlib.import_module("dashpot._C"), name, None)
    return function() if function is not None else missing


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    for name in (package, f"pytorch-{package}"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def environment(device: str) -> dict:
    """Versions and machine, for the head of a result file; nothing that names the host."""
    return {
        "dashpot": dashpot.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "build": _compiled_attribute("build_info", None),
        "cpu": _cpu_name(),
        "cpu_isa": _compiled_attribute("cpu_isa", None),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device,
        "device_name": device_name(device),
        "clocks": clocks(device),
    }


def clocks(device: str) -> str | None:
    """The clock rates right now, where the system tells them."""
    if device == "cuda":
        if shutil.which("nvidia-smi") is None:
            return None
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 else None
    listing = Path("/proc/cpuinfo")
    if not listing.exists():
        return None
    rates = [line for line in listing.read_text().splitlines() if line.startswith("cpu MHz")]
    return f"{rates[0].partition(':')[2].strip()} MHz" if rates else None


def _gpu() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "none" if torch.version.cuda else "none (torch was built without CUDA)"


def versions() -> list[tuple[str, str]]:
    """Rows of the first table."""
    build = _compiled_attribute("build_info", None)
    if importlib.util.find_spec("dashpot._C") is None:
        compiled = "no: the PyTorch reference serves every op"
    else:
        compiled = ", ".join(f"{key} {value}" for key, value in (build or {}).items()) or "yes"
    return [
        ("dashpot", dashpot.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", _version("triton") or "not installed"),
        ("compiled module", compiled),
        ("CPU", _cpu_name()),
        ("CPU kernels' instruction set", _compiled_attribute("cpu_isa", None) or "none built"),
        ("threads", str(torch.get_num_threads())),
        ("GPU", _gpu()),
    ]


def availability() -> list[tuple[str, ...]]:
    """Rows (op, then per backend "yes" or why not), asked with float32 inputs."""
    rows = []
    for name, op in REGISTRY.items():
        cells = {}
        for device in devices():
            args = op.inputs(op.sizes["test"][0], torch.float32, torch.device(device), 0)
            for backend, reason in reasons(op, args).items():
                # On a machine with a GPU each backend is asked with tensors of its own device.
                own = backend in BACKENDS and device in BACKENDS[backend].devices
                if backend not in cells or reason is None or (own and cells[backend] != "yes"):
                    cells[backend] = "yes" if reason is None else reason
        rows.append((f"{name}" if isinstance(op, Op) else f"{name} (chain)", *cells.values()))
    return rows


def availability_headers() -> tuple[str, ...]:
    return ("op", *BACKENDS, "reference")
