"""phocas: one read and one write, against plain PyTorch: trimmed mean, distances, top-k."""

from dashpot._measure import Peer

from bench.aggregate import sizes
from bench.aggregate.bench_meamed import mean_around

OP = "phocas"
SIZES = sizes.RULES


def topk(grads, f):
    x = grads.sort(dim=0).values  # (p, d)
    return mean_around(x, x[f : len(x) - f].mean(0), len(x) - f)


PEERS = {"torch topk": Peer(topk, sizes.float32_up_to_100_000)}


def test_phocas(measure):
    measure()
