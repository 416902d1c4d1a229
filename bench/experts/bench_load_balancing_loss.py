"""load_balancing_loss: against one-hot and means, as models write it."""

import torch
from dashpot._measure import Peer

OP = "load_balancing_loss"
SIZES = {torch.float32: [(8, 2, 65_536), (64, 2, 65_536)]}


def one_hot(logits, expert_idx):
    experts = logits.shape[1]
    ids = torch.where(expert_idx < 0, experts, expert_idx).long()
    hot = torch.nn.functional.one_hot(ids, experts + 1)[..., :experts].float()  # (T, k, E)
    share = hot.mean((0, 1))
    return experts * (share * logits.softmax(1, dtype=torch.float32).mean(0)).sum()


PEERS = {"one_hot": Peer(one_hot)}


def test_load_balancing_loss(measure):
    measure()
