"""Peak memory of the contrastive losses, forward + backward, D = 128, against eager PyTorch.

Each run is a process of its own: by how much its resident set grows at most beyond the inputs,
which counts what torch allocates as well as what C++ keeps for itself. At B = 65,536 eager PyTorch
would store matrices of 17 GB (info_nce) and 69 GB (both views).

    python -m bench.bench_contrastive_memory LOSS CONTENDER B      one run; prints bytes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import dashpot
import pytest
import torch
from dashpot._info import environment

D = 128
RUNS = [
    *((loss, contender, 8192)
      for loss in ("info_nce", "nt_xent", "regularized_info_nce")
      for contender in ("dashpot", "plain PyTorch")),
    ("info_nce", "dashpot", 65_536),
    ("regularized_info_nce", "dashpot", 65_536),
]  # fmt: skip


def _plain(loss: str, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    from bench.contrastive import bench_info_nce, bench_nt_xent, bench_regularized_info_nce

    if loss == "info_nce":
        return bench_info_nce.plain(z1, z2, None, 25.0).mean()
    if loss == "nt_xent":
        return bench_nt_xent.plain(
            z1, z2, None, None, None, None, 0, 0.04, True, False
        ).mean()  # fmt: skip
    contrastive, koleo = bench_regularized_info_nce.plain(z1, z2, None, 0.04)
    return contrastive + 0.1 * koleo


def _step(loss: str, contender: str, b: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(b, D, generator=generator).requires_grad_()
    z2 = (z1.detach() + torch.randn(b, D, generator=generator)).requires_grad_()
    options = {"symmetric": True} if loss == "info_nce" else {}
    if contender == "dashpot":
        value = getattr(dashpot, loss)(z1, z2, **options)
    else:
        value = _plain(loss, z1, z2)
    value.backward()
    assert z1.grad.isfinite().all() and z1.grad.any()
    print(f"{loss} {contender} B={b}: loss {value.item():.6f}", file=sys.stderr)


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def _run(loss: str, contender: str, b: int) -> int:
    """Bytes."""
    _step(loss, contender, 128)  # what is loaded once
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _step(loss, contender, b)
    inputs_and_grads = 4 * b * D * 4
    return _resident("VmHWM") - before - inputs_and_grads


@pytest.mark.parametrize(("loss", "contender", "b"), RUNS)
def test_contrastive_memory(benchmark, loss, contender, b):
    command = [sys.executable, "-m", "bench.bench_contrastive_memory", loss, contender, str(b)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = int(done.stdout)
    benchmark.extra_info.update(
        op="contrastive_memory", corner="D = 128, forward + backward", line=f"{loss}, {contender}",
        column=f"B = {b:,}", cell=f"{size / 2**20:,.0f} MiB",
        value=size, options={},
        **{key: environment("cpu")[key] for key in ("device_name", "torch", "threads")},
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)  # measured in the process


if __name__ == "__main__":
    print(_run(sys.argv[1], sys.argv[2], int(sys.argv[3])))
