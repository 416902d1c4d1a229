"""bulyan: two reads and one write, against plain PyTorch in the form of the published code:
distances by torch.cdist, Krum in a loop, then sort, distances to the median and top-k."""

import torch
from dashpot._measure import Peer

from bench.aggregate import sizes
from bench.aggregate.bench_meamed import mean_around, middle

OP = "bulyan"
SIZES = sizes.FLOAT32


def plain(grads, f):
    p = len(grads)
    distance = torch.cdist(grads, grads, compute_mode="donot_use_mm_for_euclid_dist").square()
    remaining = list(range(p))
    chosen = []
    while len(remaining) > 2 * f:
        k = max(1, len(remaining) - f - 2)
        near = distance[remaining][:, remaining].sort(dim=1).values[:, 1 : k + 1]
        chosen.append(remaining.pop(int(near.sum(1).argmin())))
    x = grads[chosen]  # (p - 2 f, d)
    return mean_around(x, middle(x.sort(dim=0).values), p - 4 * f)


PEERS = {"torch": Peer(plain, sizes.up_to_a_million)}


def test_bulyan(measure):
    measure()
