"""What test_distributed.py runs in real processes, one per rank, over gloo:

    python tests/ranks GROUP FOLDER

GROUP is a key of GROUPS in common.py. torch is imported once and the ranks are forked. Each rank
runs the group's checks in order; the first rank writes their names to FOLDER/checks and the name of
each that it has passed to FOLDER/passed. A check that fails ends all ranks, with its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from common import DEAD_AFTER, GROUPS


def run(rank: int, group: str, folder: str) -> None:
    p, checks = GROUPS[group]
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", p)
    timeout = timedelta(seconds=DEAD_AFTER if group == "dead" else 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=p, timeout=timeout)
    for one in checks:
        one(rank, p)
        if group != "dead":
            dist.barrier()
        if rank == 0:
            with Path(folder, "passed").open("a") as file:
                file.write(f"{one.__name__}\n")
    if group == "dead":
        os._exit(0)  # a group that lacks a rank cannot be closed
    dist.destroy_process_group()


if __name__ == "__main__":
    group, folder = sys.argv[1:]
    importlib.import_module({"fsdp_of_two": "fsdp"}.get(group, group))
    Path(folder, "checks").write_text("\n".join(one.__name__ for one in GROUPS[group][1]))
    torch.multiprocessing.start_processes(
        run, (group, folder), nprocs=GROUPS[group][0], start_method="fork"
    )
