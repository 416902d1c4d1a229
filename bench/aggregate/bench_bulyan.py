"""bulyan: two reads and one write, against plain PyTorch in the form of the published code:
distances by torch.cdist, Krum in a loop, then sort, distances to the median and top-k."""

import torch
from dashpot._measure import Peer

OP = "bulyan"
SIZES = {torch.float32: [(15, 100_000), (15, 1_000_000), (7, 1_000_000)]}


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
    ordered = x.sort(dim=0).values
    center = 0.5 * (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2])
    nearest = (x - center).abs().topk(p - 4 * f, dim=0, largest=False, sorted=False).indices
    return x.gather(0, nearest).mean(0)


PEERS = {"torch": Peer(plain)}


def test_bulyan(measure):
    measure()
