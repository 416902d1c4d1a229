"""Rows that the tests of this family share, and what they are held against."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def _spec_views(device="cpu", dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views (4, 3): the specification's vectors."""
    z1 = [[1, 0, 2], [0, 1, -1], [3, 1, 0], [-1, 2, 1]]
    z2 = [[1, 0.5, 1.5], [0.5, 1, 0], [2, -1, 1], [-1, 1, 0]]
    views = (torch.tensor(z, dtype=dtype, device=device) for z in (z1, z2))
    return tuple(view.requires_grad_() for view in views)


@pytest.fixture
def spec_views():
    return _spec_views


@pytest.fixture
def spec_ids():
    return torch.tensor([0, 1, 0, 2])


@pytest.fixture
def views():
    """views(b, d, seed, dtype): two views (b, d) that want gradients, the second near the first."""

    def make(b, d, seed=0, dtype=torch.float64, device="cpu"):
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(b, d, generator=generator)
        second = first + torch.randn(b, d, generator=generator)
        return tuple(z.to(device, dtype).requires_grad_() for z in (first, second))

    return make


@pytest.fixture
def peers(monkeypatch):
    """bench/peers.py, which imports the libraries compared with."""
    import importlib

    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("bench.peers")


@pytest.fixture(scope="session")
def in_process():
    """in_process(code): the output of Python code in a process of its own, with one thread."""

    def run(code: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              env=environment, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _resident_growth(*setup: str, step: str) -> int:
    """Bytes by which the resident set grows at most while `step` runs after `setup`, in a process
    of its own: what torch allocates and what C++ does. A smaller step has run before."""
    program = "\n".join([
        "import torch, dashpot",
        "def resident(kind):",
        "    lines = open('/proc/self/status').read().splitlines()",
        "    return next(int(line.split()[1]) for line in lines if line.startswith(kind))",
        "torch.set_num_threads(1)",
        "x = torch.randn(256, 8, requires_grad=True)",
        "dashpot.supcon_loss(x, torch.arange(256) % 9, normalize=True).backward()",
        *setup,
        "open('/proc/self/clear_refs', 'w').write('5')",  # the peak starts anew
        "before = resident('VmRSS')",
        step,
        "print(resident('VmHWM') - before)",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return 1024 * int(done.stdout)


@pytest.fixture(scope="session")
def resident_growth():
    return _resident_growth
