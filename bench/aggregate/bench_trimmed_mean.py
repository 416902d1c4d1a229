"""trimmed_mean: one read and one write, against a sort, byzfl and torchjd."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "trimmed_mean"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def sort(grads, f):
    return grads.sort(dim=0).values[f : len(grads) - f].mean(0)  # (d,)


def byzfl(grads, f):
    return peers.load("byzfl").TrMean(f=f)(grads).to(grads.dtype)


def torchjd(grads, f):
    return peers.load("torchjd.aggregation").TrimmedMean(f)(grads)


PEERS = {
    "torch.sort": Peer(sort, lambda size, *_: size[1] <= 1_000_000),
    "byzfl": Peer(byzfl, lambda size, *_: size[1] <= 1_000_000),
    "torchjd": Peer(torchjd, lambda size, *_: size[1] <= 1_000_000),
}


def test_trimmed_mean(measure):
    measure()
