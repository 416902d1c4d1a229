"""A rank that dies: what the others get."""

from __future__ import annotations

import os
import time

import pytest
import torch
from common import DEAD_AFTER, Net, batch, check, used_parameters
from dashpot.distributed import RobustState, robust_all_reduce
from ddp import wrap


@check("dead")
def a_rank_dies(rank, p):
    net = Net()
    used_parameters(net)
    ddp, _ = wrap(net, RobustState("flag"))
    ddp(batch(rank, 0)).backward()
    robust_all_reduce(torch.ones(10), "flag")
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        robust_all_reduce(torch.ones(10), "flag")
    with pytest.raises(RuntimeError):
        ddp(batch(rank, 1)).backward()
    assert time.monotonic() - start < 3 * DEAD_AFTER


# --------------------------------------------------------------------------------------------
