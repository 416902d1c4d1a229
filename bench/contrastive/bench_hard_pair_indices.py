"""hard_pair_indices against the B x B matrix with masks."""

import torch
from dashpot._measure import Peer

OP = "hard_pair_indices"
SIZES = {torch.float32: [(256, 2048), (4096, 256)]}


def matrix(features, labels, official):
    """Even sizes ask for the official form."""
    u = torch.nn.functional.normalize(features, dim=1)
    cosine = u @ u.mT  # (B, B)
    same = labels[:, None] == labels[None, :]
    off = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    out = 0.0 if official else torch.inf
    positive = torch.where(same & off, cosine, out).argmin(1)
    negative = torch.where(same, -out, cosine).argmax(1)
    index = torch.arange(len(u), device=u.device)
    return (torch.where(positive == 0, index, positive) if official else positive), negative


PEERS = {"matrix": Peer(matrix)}


def test_hard_pair_indices(measure):
    measure()
