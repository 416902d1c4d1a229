"""dashpot.distributed in real processes over gloo; what they run is in tests/ranks/."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dashpot.distributed import RobustReduceScatter, RobustState
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

RANKS = Path(__file__).with_name("ranks")
GROUPS = ("all_reduce", "ddp", "fsdp", "fsdp_of_two", "dead")


@pytest.mark.timeout(200)
@pytest.mark.parametrize("group", GROUPS)
def test_ranks(tmp_path, group):
    """Every check of the group, one after the other in the same processes; the first one that fails
    ends them, and its traceback is shown."""
    done = subprocess.run(
        [sys.executable, str(RANKS), group, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
    )  # fmt: skip
    checks, passed = (
        file.read_text().split() if file.exists() else []
        for file in (tmp_path / "checks", tmp_path / "passed")
    )
    assert checks, done.stdout
    assert passed == checks, done.stdout[-6000:]
    assert done.returncode == 0, done.stdout[-6000:]


def test_fsdp_comm_has_what_torch_asks_for():
    for name in ReduceScatter.__abstractmethods__:
        want = inspect.signature(getattr(ReduceScatter, name)).parameters
        got = inspect.signature(getattr(RobustReduceScatter, name)).parameters
        assert list(got) == list(want)
        assert [one.kind for one in got.values()] == [one.kind for one in want.values()]
    buffer = RobustReduceScatter("flag").allocate((5,), dtype=torch.bfloat16, device="cpu")
    assert (buffer.shape, buffer.dtype) == ((5,), torch.bfloat16)


def test_state_errors():
    with pytest.raises(ValueError, match="scope: expected one of global, bucket, got 'layer'"):
        RobustState("flag", scope="layer")
    with pytest.raises(ValueError, match="rule: expected one of"):
        RobustState("no such rule")
