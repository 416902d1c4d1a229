"""coordinate_rules: median and trimmed mean of each coordinate in one read, against what a good
user writes: one sort along the workers, and both from it. byzfl's two calls sort twice."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "coordinate_rules"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def one_sort(grads, mask, p, count, f, rules):
    (rows,) = grads  # (p, d)
    x = rows.sort(dim=0).values
    return [0.5 * (x[(p - 1) // 2] + x[p // 2]), x[f : p - f].mean(0)]


def byzfl(grads, mask, p, count, f, rules):
    (rows,) = grads
    module = peers.load("byzfl")
    return [module.Median()(rows).to(rows.dtype), module.TrMean(f=f)(rows).to(rows.dtype)]


def up_to_a_million(size, *_):
    return size[1] <= 1_000_000


PEERS = {
    "torch.sort": Peer(one_sort, up_to_a_million),
    "byzfl": Peer(byzfl, up_to_a_million),
}


def test_coordinate_rules(measure):
    measure()
