"""phocas: one read and one write, against plain PyTorch: trimmed mean, distances, top-k."""

from dashpot._measure import Peer

from bench.aggregate import sizes
from bench.aggregate.bench_meamed import mean_around

OP = "phocas"
SIZES = sizes.RULES


def topk(grads, f):
    x = grads.sort(dim=0).values  # (p, d)
    return mean_around(x, x[f : len(x) - f].mean(0), len(x) - f)


def float32_a_million(size, dtype, *_):
    """Timed, not checked: a few of a million distances round the other way."""
    return dtype == sizes.torch.float32 and size[1] == 1_000_000


PEERS = {
    "torch topk": Peer(topk, sizes.float32_up_to_100_000),
    "torch topk, unchecked": Peer(topk, float32_a_million, checked=False),
}


def test_phocas(measure):
    measure()
