"""monna: the mean of the p - f rows nearest to worker 1, against byzfl, which forms the distances
from that one worker alone."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "monna"
SIZES = sizes.FLOAT32


def byzfl(grads, f, idx):
    return peers.load("byzfl").MoNNA(f, idx)(grads).to(grads.dtype)


PEERS = {"byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl")}


def test_monna(measure):
    measure()
