"""info_nce_queue, forward and backward, against the matrix of logits in plain PyTorch."""

import torch
from dashpot._measure import Peer
from torch.nn import functional

OP = "info_nce_queue"
SIZES = {torch.float32: [(256, 128), (2048, 128)], torch.bfloat16: [(2048, 128)]}
GRADIENT = (0, 1)


def plain(query, key, queue, temperature, normalize):
    u, v, n = (functional.normalize(z, dim=1) for z in (query, key, queue))
    logits = torch.cat([(u * v).sum(1, keepdim=True), u @ n.T], 1) / temperature  # (B, 1 + M)
    return functional.cross_entropy(
        logits, torch.zeros(len(u), dtype=torch.long, device=u.device), reduction="none"
    )


PEERS = {"plain PyTorch": Peer(plain)}


def test_info_nce_queue(measure):
    measure()
