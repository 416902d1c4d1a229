"""koleo_loss, forward and backward, against lightly's."""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "koleo_loss"
SIZES = {torch.float32: [(256, 128), (4096, 128)], torch.bfloat16: [(4096, 128)]}
GRADIENT = (0,)


def FLOOR(z, *_):
    """Rows in, gradient out; cosines once, by symmetry."""
    return 2 * z.numel() * z.element_size(), z.shape[0] * z.numel()


def plain(z, keys, offset, topk, eps, normalize):
    u = functional.normalize(z, dim=1, eps=eps)
    with torch.no_grad():
        nearest = (u @ u.T).fill_diagonal_(-torch.inf).argmax(1)  # (B,)
    return -torch.log(functional.pairwise_distance(u, u[nearest], eps=eps) + eps)


def lightly(z, *_):
    """Both passes; not checked, since it returns a mean and no rows."""
    with torch.enable_grad():
        loss = peers.load("lightly.loss").KoLeoLoss()(z)
        return torch.autograd.grad(loss, z)


PEERS = {
    "plain PyTorch": Peer(plain),
    "torch.compile": Peer(torch.compile(plain, dynamic=False), peers.on_a_gpu),
    "lightly": Peer(lightly, checked=False, needs="lightly"),
}


def test_koleo_loss(measure):
    measure()
