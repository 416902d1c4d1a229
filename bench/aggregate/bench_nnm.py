"""nnm: distances and the mixing matrix, against the distances that a user would write. byzfl forms
the mixed rows as well, which is what `nnm` is there to avoid."""

import torch
from dashpot._measure import Peer

from bench.aggregate import sizes

OP = "nnm"
SIZES = sizes.FLOAT32


def cdist(grads, f):
    p = len(grads)
    nearest = torch.cdist(grads, grads).topk(p - f, largest=False).indices  # (p, p - f)
    mixing = torch.zeros(p, p, dtype=torch.float64, device=grads.device)
    return mixing.scatter_(1, nearest, 1 / (p - f))


PEERS = {"torch.cdist": Peer(cdist, sizes.up_to_a_million)}


def test_nnm(measure):
    measure()
