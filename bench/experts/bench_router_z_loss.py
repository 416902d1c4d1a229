"""router_z_loss: against logsumexp, square, mean."""

import torch
from dashpot._measure import Peer

OP = "router_z_loss"
SIZES = {torch.float32: [(8, 2, 65_536), (64, 2, 65_536)]}


def composed(logits):
    return logits.float().logsumexp(1).square().mean()


PEERS = {"logsumexp": Peer(composed)}


def test_router_z_loss(measure):
    measure()
