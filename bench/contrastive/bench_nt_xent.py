"""nt_xent, forward and backward, against lightly's and pytorch-metric-learning's losses, which know
no subjects, and plain PyTorch with subject masks.

pytorch-metric-learning forms a matrix (positive pairs, negative pairs): 2B by 4B^2 numbers, 0.5 GB
at B = 256 and 2.2 TB at B = 4096, so it is listed up to B = 256.
"""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "nt_xent"
SIZES = {torch.float32: [(256, 128), (2048, 128), (4096, 128)], torch.bfloat16: [(2048, 128)]}
GRADIENT = (0, 1)


def FLOOR(z1, z2, *_):
    """M = 2B rows: M^2 D forward by symmetry, the same again backward and 2 M^2 D for the
    gradient."""
    return 4 * z1.numel() * z1.element_size(), 16 * z1.shape[0] * z1.numel()


def plain(z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view, mask_cross_view):
    b = len(z1)
    z = functional.normalize(torch.cat([z1, z2]), dim=1)  # (2B, D)
    logits = z @ z.T / temperature  # (2B, 2B)
    ids = torch.arange(b, device=z.device) if ids is None else ids
    same = (ids[:, None] == ids[None, :]).repeat(2, 2)
    view = torch.arange(2 * b, device=z.device) >= b
    drop = same & (view[:, None] == view[None, :])
    target = torch.arange(2 * b, device=z.device).roll(b)
    return functional.cross_entropy(logits.masked_fill(drop, -torch.inf), target, reduction="none")


def lightly(z1, z2, *_):
    """Both passes; not checked, since it returns a mean and no rows."""
    with torch.enable_grad():
        loss = peers.load("lightly.loss").NTXentLoss(0.2)(z1, z2)
        return torch.autograd.grad(loss, (z1, z2))


def metric_learning(z1, z2, *_):
    loss = peers.load("pytorch_metric_learning.losses").NTXentLoss(0.2)
    labels = torch.arange(len(z1), device=z1.device).repeat(2)
    with torch.enable_grad():
        return torch.autograd.grad(loss(torch.cat([z1, z2]), labels), (z1, z2))


PEERS = {
    "plain PyTorch": Peer(plain),
    "torch.compile": Peer(torch.compile(plain, dynamic=False), peers.on_a_gpu),
    # without subjects: less work
    "lightly": Peer(lightly, checked=False, needs="lightly"),
    "pytorch-metric-learning": Peer(
        metric_learning,
        lambda size, *_: size[0] <= 256,
        needs="pytorch_metric_learning",
        checked=False,
    ),
}


def test_nt_xent(measure):
    measure()
