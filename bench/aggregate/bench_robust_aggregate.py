"""robust_aggregate: what the one interface costs beside the rule's own function."""

import dashpot
import torch
from dashpot._measure import Peer

OP = "robust_aggregate"
SIZES = {torch.float32: [(15, 1_000_000)]}
PEERS = {"flag_aggregate": Peer(lambda grads: dashpot.flag_aggregate(grads))}


def test_robust_aggregate(measure):
    measure()
