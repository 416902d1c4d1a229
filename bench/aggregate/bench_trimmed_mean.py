"""trimmed_mean: one read and one write, against a sort, byzfl and torchjd."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "trimmed_mean"
SIZES = sizes.RULES


def sort(grads, f):
    return grads.sort(dim=0).values[f : len(grads) - f].mean(0)  # (d,)


def byzfl(grads, f):
    return peers.load("byzfl").TrMean(f=f)(grads).to(grads.dtype)


def torchjd(grads, f):
    return peers.load("torchjd.aggregation").TrimmedMean(f)(grads)


PEERS = {
    "torch.sort": Peer(sort, sizes.up_to_a_million),
    "byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl"),
    "torchjd": Peer(torchjd, sizes.up_to_a_million, needs="torchjd"),
}


def test_trimmed_mean(measure):
    measure()
