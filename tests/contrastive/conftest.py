"""What the tests of this family share."""

from __future__ import annotations

import subprocess
import sys

import pytest


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
