"""info_nce in both directions with a learnable scale, forward and backward: against open_clip's
loss, plain PyTorch, torch.compile, and (on a GPU, where it is installed) Inf-CL. The inputs of odd
batches are those of the CLIP loss.

pytorch-metric-learning forms an index list of all pairs and a matrix (positive pairs, negative
pairs): B^3 numbers, so it is listed up to B = 257, and computes NT-Xent there.
"""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "info_nce"
SIZES = {torch.float32: [(65, 128), (257, 128), (4097, 128)], torch.bfloat16: [(4097, 128)]}
GRADIENT = (0, 1, 3)


def FLOOR(query, key, *_):
    """Rows in, gradients out; logits once forward and once backward, and a product for each side.
    Both directions share them."""
    rows = query.numel() + key.numel()
    return 2 * rows * query.element_size(), 8 * query.numel() * key.shape[0]


def plain(query, key, positives, logit_scale, *_):
    u, v = functional.normalize(query, dim=1), functional.normalize(key, dim=1)
    logits = logit_scale * u @ v.T  # (B, B)
    target = torch.arange(len(u), device=u.device)
    rows = functional.cross_entropy(logits, target, reduction="none")
    return 0.5 * (rows + functional.cross_entropy(logits.T, target, reduction="none"))


def open_clip(query, key, positives, logit_scale, *_):
    """Both passes; not checked, since it returns a mean and no rows."""
    loss = peers.load("open_clip.loss").ClipLoss()
    with torch.enable_grad():
        unit = (functional.normalize(z, dim=1) for z in (query, key))
        return torch.autograd.grad(loss(*unit, logit_scale), (query, key, logit_scale))


def metric_learning(query, key, positives, logit_scale, temperature, *_):
    loss = peers.load("pytorch_metric_learning.losses").NTXentLoss(temperature)
    labels = torch.arange(len(query), device=query.device).repeat(2)
    with torch.enable_grad():
        return torch.autograd.grad(loss(torch.cat([query, key]), labels), (query, key))


def inf_cl(query, key, positives, logit_scale, *_):
    loss = peers.load("inf_cl").cal_flash_loss
    unit = [functional.normalize(z, dim=1) for z in (query, key)]
    target = torch.arange(len(query), device=query.device)
    return 0.5 * (loss(*unit, target, logit_scale) + loss(*unit[::-1], target, logit_scale))


def products(query, key, *_):
    """The bare products: logits, and the gradients of both sides, twice as in both directions."""
    with torch.no_grad():
        s = query @ key.T  # (B, B)
        return (query @ key.T, s @ key, s.T @ query, s @ key, s.T @ query)


compiled = torch.compile(plain, dynamic=False)
PEERS = {
    "plain PyTorch": Peer(plain),
    "torch.compile": Peer(compiled, peers.on_a_gpu),
    "open_clip": Peer(open_clip, checked=False, needs="open_clip"),  # a mean, not rows
    "pytorch-metric-learning": Peer(
        metric_learning,
        lambda size, *_: size[0] <= 257,
        needs="pytorch_metric_learning",
        checked=False,
    ),
    "Inf-CL": Peer(inf_cl, peers.on_a_gpu, needs="inf_cl"),
    "6 products": Peer(products, checked=False),
}


def test_info_nce(measure):
    measure()
