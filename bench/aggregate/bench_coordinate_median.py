"""coordinate_median: one read and one write, against torch.median, a sort, and byzfl.

All workers counts are odd but 60; there torch.median takes the lower middle value."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "coordinate_median"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def torch_median(grads):
    return grads.median(dim=0).values  # (d,)


def sort(grads):
    x, p = grads.sort(dim=0).values, len(grads)  # (p, d)
    return 0.5 * (x[(p - 1) // 2] + x[p // 2])


def byzfl(grads):
    return peers.load("byzfl").Median()(grads).to(grads.dtype)


PEERS = {
    "torch.median": Peer(torch_median, lambda size, *_: size[1] <= 1_000_000 and size[0] % 2),
    "torch.sort": Peer(sort, lambda size, *_: size[1] <= 1_000_000),
    "byzfl": Peer(byzfl, lambda size, *_: size[1] <= 1_000_000),
}


def test_coordinate_median(measure):
    measure()
