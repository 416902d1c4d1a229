"""mda: distances, the exact subset, its mean, against byzfl, which enumerates subsets
(600,000 of 30 workers; of 60 the reference could not)."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "mda"
SIZES = {dtype: [size for size in each if size[0] <= 30] for dtype, each in sizes.FLOAT32.items()}


def byzfl(grads, f):
    return peers.load("byzfl").MDA(f)(grads).to(grads.dtype)


PEERS = {
    "byzfl": Peer(
        byzfl, lambda size, *_: size[0] <= 15 and sizes.up_to_a_million(size), needs="byzfl"
    )
}


def test_mda(measure):
    measure()
