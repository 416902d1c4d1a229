"""regularized_info_nce with subjects, D = 128: forward and backward of both views, against the
operations of the published code in plain PyTorch: three matrices of exponentials, masks and sums,
and two searches for neighbours.
"""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "regularized_info_nce"
SIZES = {torch.float32: [(256, 128), (2048, 128)], torch.bfloat16: [(2048, 128)]}
GRADIENT = (0, 1)


def FLOOR(z1, z2, *_):
    """M = 2B rows: M^2 D forward by symmetry, the same again backward and 2 M^2 D for the
    gradient."""
    return 4 * z1.numel() * z1.element_size(), 16 * z1.shape[0] * z1.numel()


def koleo(z):
    u = functional.normalize(z, dim=1, eps=1e-8)
    cosine = u @ u.T  # (B, B), with a graph: the published code has no torch.no_grad() here
    cosine.diagonal().fill_(-1)
    nearest = cosine.max(1).indices  # (B,)
    return -torch.log(functional.pairwise_distance(u, u[nearest], eps=1e-8) + 1e-8).mean()


def plain(z1, z2, ids, temperature, *_):
    """(contrastive loss, mean of both KoLeo losses), exponentials before the division."""
    u, v = functional.normalize(z1, dim=1), functional.normalize(z2, dim=1)
    ids = torch.arange(len(u), device=u.device) if ids is None else ids
    other = (ids[:, None] != ids[None, :]).to(u.dtype)  # (B, B)
    across = torch.exp(u @ v.T / temperature)
    first = torch.exp(u @ u.T / temperature) * other
    second = torch.exp(v @ v.T / temperature) * other
    positive = across.diagonal()
    rows = -torch.log(positive / (across.sum(1) + first.sum(1)))
    columns = -torch.log(positive / (across.sum(0) + second.sum(0)))
    return 0.5 * (rows.mean() + columns.mean()), 0.5 * (koleo(z1) + koleo(z2))


def products(z1, z2, *_):
    """The plain form's bare products: three for the values, six for the gradients."""
    with torch.no_grad():
        across, first, second = z1 @ z2.T, z1 @ z1.T, z2 @ z2.T
        return (across @ z2, across.T @ z1, first @ z1, first.T @ z1, second @ z2, second.T @ z2)


PEERS = {
    "plain PyTorch": Peer(plain),
    "torch.compile": Peer(torch.compile(plain, dynamic=False), peers.on_a_gpu),
    "9 products": Peer(products, checked=False),
}


def test_regularized_info_nce(measure):
    measure()
