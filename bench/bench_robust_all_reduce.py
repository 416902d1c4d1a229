"""robust_all_reduce over gloo against PyTorch's own all-reduce and against collecting the rows.

Four processes of one thread each on this machine, d float32 numbers per worker. "all_reduce" is
what DDP does: a sum and a division; "all_gather, flag" brings every row to every rank and
aggregates there. The contenders take turns, so that all meet the same machine; a time is the median
over turns of the slowest rank's. Bytes that a rank sends, in units of d numbers of s bytes:

    all_reduce, robust_all_reduce   2 (p-1)/p     all_gather   p - 1

    python bench/bench_robust_all_reduce.py D FOLDER      one size; what the test below starts
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import dashpot
import pytest
import torch
import torch.distributed as dist
from dashpot._info import environment
from dashpot.distributed import robust_all_reduce

RANKS = 4
TURNS = {100_000: 31, 1_000_000: 15, 10_000_000: 5}  # by d


def _mean(row: torch.Tensor) -> torch.Tensor:
    total = row.clone()
    dist.all_reduce(total)
    return total.div_(RANKS)


def _collected(row: torch.Tensor) -> torch.Tensor:
    rows = row.new_empty((RANKS, row.numel()))
    dist.all_gather(list(rows.unbind(0)), row)
    return dashpot.flag_aggregate(rows)


def _robust(rule: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda row: robust_all_reduce(row, rule, check=False)


CONTENDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all_reduce": _mean,
    "all_gather, flag": _collected,
    "flag": _robust("flag"),
    "geometric_median": _robust("geometric_median"),
    "coordinate_median": _robust("coordinate_median"),
}


def _rank(rank: int, d: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    generator = torch.Generator().manual_seed(rank)
    row = 1 + torch.randn(d, generator=generator)
    torch.testing.assert_close(CONTENDERS["flag"](row), _collected(row), rtol=1e-3, atol=1e-4)
    seconds = torch.zeros(TURNS[d], len(CONTENDERS), dtype=torch.float64)
    for turn in range(TURNS[d]):
        for at, run in enumerate(CONTENDERS.values()):
            dist.barrier()
            start = time.perf_counter()
            run(row)
            seconds[turn, at] = time.perf_counter() - start
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    if rank == 0:
        medians = [statistics.median(column) for column in seconds.mT.tolist()]
        Path(folder, "seconds.json").write_text(json.dumps(medians))
    dist.destroy_process_group()


@functools.cache
def _seconds(d: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, str(d), folder], check=True, timeout=300)
        medians = json.loads(Path(folder, "seconds.json").read_text())
    return dict(zip(CONTENDERS, medians, strict=True))


@pytest.mark.parametrize("d", TURNS)
@pytest.mark.parametrize("contender", CONTENDERS)
def test_robust_all_reduce(benchmark, contender, d):
    seconds = _seconds(d)
    own, plain = seconds[contender], seconds["all_reduce"]
    benchmark.extra_info.update(
        op="robust_all_reduce", corner=f"{RANKS} ranks, gloo", line=contender, column=f"d = {d:,}",
        cell=f"{1e3 * own:.2f} ms, {own / plain:.2f}x", value=own, options={},
        **{key: environment("cpu")[key] for key in ("device_name", "torch")},
    )  # fmt: skip
    benchmark.pedantic(lambda: None, rounds=1)  # timed in the ranks


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        _rank, (int(sys.argv[1]), sys.argv[2]), RANKS, start_method="fork"
    )
