"""koleo_loss, forward and backward, against lightly's."""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "koleo_loss"
SIZES = {torch.float32: [(256, 128), (4096, 128)], torch.bfloat16: [(4096, 128)]}
GRADIENT = (0,)


def plain(z, keys, offset, topk, eps, normalize):
    u = functional.normalize(z, dim=1, eps=eps)
    with torch.no_grad():
        nearest = (u @ u.T).fill_diagonal_(-torch.inf).argmax(1)  # (B,)
    return -torch.log(functional.pairwise_distance(u, u[nearest], eps=eps) + eps)


def lightly(z, *_):
    return peers.load("lightly.loss").KoLeoLoss()(z).expand(len(z))


PEERS = {
    "plain PyTorch": Peer(plain),
    "lightly": Peer(lightly, lambda *_: peers.has("lightly"), checked=False),  # its mean is no row
}


def test_koleo_loss(measure):
    measure()
