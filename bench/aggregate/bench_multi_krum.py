"""multi_krum: distances in one read, the mean of the p - f selected rows in a second, in the
variants of byzfl (squared distances, p - f - 1 = 11 neighbours of 15 workers) and torchjd (plain
distances, p - f - 2), against both and against what a good user writes."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "multi_krum"
SIZES = {torch.float32: [(15, 100_000), (15, 1_000_000), (15, 10_000_000)]}
OPTIONS = [{"neighbours": 11}, {"squared": False}]


def torch_gram(grads, f, neighbours=None, squared=True):
    """Distances from the product, which cancels for close workers but is the fastest."""
    neighbours = len(grads) - f - 2 if neighbours is None else neighbours
    k = grads @ grads.mT  # (p, p)
    square = k.diagonal()
    sqdist = (square[:, None] + square - 2 * k).clamp(min=0)
    distance = sqdist if squared else sqdist.sqrt()
    scores = distance.sort(dim=1).values[:, 1 : neighbours + 1].sum(1)
    return grads[scores.topk(len(grads) - f, largest=False).indices].mean(0)


def byzfl(grads, f, neighbours):
    return peers.load("byzfl").MultiKrum(f)(grads).to(grads.dtype)


def torchjd(grads, f, squared):
    krum = peers.load("torchjd.aggregation").Krum(n_byzantine=f, n_selected=len(grads) - f)
    return krum(grads)


def is_byzfls(size, dtype, device, options):
    return "neighbours" in options and size[1] <= 1_000_000


def is_torchjds(size, dtype, device, options):
    return "squared" in options and size[1] <= 1_000_000


PEERS = {
    "torch X @ X.T": Peer(torch_gram),
    "byzfl": Peer(byzfl, is_byzfls),
    "torchjd": Peer(torchjd, is_torchjds),
}


def test_multi_krum(measure):
    measure()
