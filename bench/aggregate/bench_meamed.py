"""meamed: one read and one write, against byzfl and plain PyTorch: median, distances, top-k."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "meamed"
SIZES = sizes.RULES


def mean_around(x, center, count):
    """Of x (p, d), the mean of the `count` values nearest to center (d,)."""
    nearest = (x - center).abs().topk(count, dim=0, largest=False, sorted=False).indices
    return x.gather(0, nearest).mean(0)


def middle(x):
    """The median of x (p, d), sorted."""
    return 0.5 * (x[(len(x) - 1) // 2] + x[len(x) // 2])


def topk(grads, f):
    x = grads.sort(dim=0).values  # (p, d)
    return mean_around(x, middle(x), len(x) - f)


def byzfl(grads, f):
    return peers.load("byzfl").Meamed(f=f)(grads).to(grads.dtype)


PEERS = {
    "torch topk": Peer(topk, sizes.float32_up_to_a_million),
    "byzfl": Peer(byzfl, sizes.float32_up_to_100_000, needs="byzfl"),
}


def test_meamed(measure):
    measure()
