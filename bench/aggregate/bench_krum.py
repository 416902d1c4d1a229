"""krum: distances in one read and the selected row, in the variants of byzfl (squared distances,
p - f - 1 = 11 neighbours of 15 workers) and torchjd (plain distances, p - f - 2), against both and
against what a good user writes."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "krum"
SIZES = {
    torch.float32: [(15, 100_000), (15, 1_000_000), (15, 10_000_000)],
    torch.bfloat16: [(15, 1_000_000)],
}
OPTIONS = [{"neighbours": 11}, {"squared": False}]


def torch_gram(grads, f, neighbours=None, squared=True):
    """Distances from the product, which cancels for close workers but is the fastest."""
    neighbours = len(grads) - f - 2 if neighbours is None else neighbours
    k = grads @ grads.mT  # (p, p)
    square = k.diagonal()
    sqdist = (square[:, None] + square - 2 * k).clamp(min=0)
    distance = sqdist if squared else sqdist.sqrt()
    scores = distance.sort(dim=1).values[:, 1 : neighbours + 1].sum(1)
    return grads[scores.argmin()].clone()


def byzfl(grads, f, neighbours):
    return peers.load("byzfl").Krum(f)(grads).to(grads.dtype)


def torchjd(grads, f, squared):
    return peers.load("torchjd.aggregation").Krum(n_byzantine=f)(grads)


def is_byzfls(size, dtype, device, options):
    return "neighbours" in options and size[1] <= 1_000_000


def is_torchjds(size, dtype, device, options):
    return "squared" in options and dtype == torch.float32 and size[1] <= 1_000_000


PEERS = {
    "torch X @ X.T": Peer(torch_gram),
    "byzfl": Peer(byzfl, is_byzfls),
    "torchjd": Peer(torchjd, is_torchjds),
}


def test_krum(measure):
    measure()
