"""topk_gate: against softmax, topk and the division."""

import torch
from dashpot._measure import Peer

OP = "topk_gate"
SIZES = {torch.float32: [(8, 2, 1, 65_536), (64, 8, 0, 65_536)]}


def softmax_topk(logits, k, normalize):
    values, idx = logits.softmax(1, dtype=torch.float32).topk(k)
    return idx.int(), values / values.sum(1, keepdim=True) if normalize else values


PEERS = {"softmax + topk": Peer(softmax_topk)}


def test_topk_gate(measure):
    measure()
