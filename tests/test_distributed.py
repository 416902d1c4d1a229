"""dashpot.distributed in real processes over gloo; what they run is in distributed_ranks.py."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dashpot.distributed import RobustReduceScatter, RobustState
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

PATH = Path(__file__).with_name("distributed_ranks.py")


def _load():
    spec = importlib.util.spec_from_file_location("distributed_ranks", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GROUPS = _load().GROUPS


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """ran(group): (checks that all ranks passed, what they printed); a group runs once."""
    results = {}

    def run(group: str) -> tuple[list[str], str]:
        if group not in results:
            folder = tmp_path_factory.mktemp(group)
            (folder / "passed").touch()
            done = subprocess.run(
                [sys.executable, str(PATH), group, str(folder)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=150,
            )  # fmt: skip
            passed = (folder / "passed").read_text().split()
            results[group] = passed, f"{done.stdout}\nexit status {done.returncode}"
        return results[group]

    return run


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("group", "check"),
    [(group, one.__name__) for group, (_, checks) in GROUPS.items() for one in checks],
)
def test_ranks(ran, group, check):
    passed, printed = ran(group)
    assert check in passed, printed[-6000:]


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
