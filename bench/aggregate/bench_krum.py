"""krum: distances in one read and the selected row, in the variants of byzfl (squared distances,
p - f - 1 = 11 neighbours of 15 workers) and torchjd (plain distances, p - f - 2), against both and
against what a good user writes."""

import torch
from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "krum"
SIZES = sizes.RULES
OPTIONS = [{"neighbours": 11}, {"squared": False}]


def scores(grads, f, neighbours=None, squared=True):
    """(p,) from the product's distances, which cancel for close workers but are the fastest."""
    neighbours = len(grads) - f - 2 if neighbours is None else neighbours
    k = grads @ grads.mT  # (p, p)
    square = k.diagonal()
    sqdist = (square[:, None] + square - 2 * k).clamp(min=0)
    distance = sqdist if squared else sqdist.sqrt()
    return distance.sort(dim=1).values[:, 1 : neighbours + 1].sum(1)


def torch_gram(grads, f, **options):
    return grads[scores(grads, f, **options).argmin()].clone()


def byzfl(grads, f, neighbours):
    return peers.load("byzfl").Krum(f)(grads).to(grads.dtype)


def torchjd(grads, f, squared):
    return peers.load("torchjd.aggregation").Krum(n_byzantine=f)(grads)


def is_byzfls(size, dtype, device, options):
    return "neighbours" in options and size[0] == 15 and sizes.up_to_a_million(size)


def is_torchjds(size, dtype, device, options):
    return "squared" in options and sizes.float32_up_to_a_million(size, dtype)


PEERS = {
    # Not in bfloat16: its distances are so wrong there that it takes another row, and is refused.
    "torch X @ X.T": Peer(torch_gram, lambda size, dtype, *_: dtype == torch.float32),
    "byzfl": Peer(byzfl, is_byzfls, needs="byzfl"),
    "torchjd": Peer(torchjd, is_torchjds, needs="torchjd"),
}


def test_krum(measure):
    measure()
