"""route_balanced: a random order cut into E parts; beside it torch's random order alone."""

import torch
from dashpot._measure import Peer

OP = "route_balanced"
SIZES = {torch.float32: [(8, 65_536)]}


def randperm(seed, offset, units, experts):
    return torch.randperm(units, dtype=torch.int32, device=seed.device)


PEERS = {"torch.randperm": Peer(randperm, checked=False)}


def test_route_balanced(measure):
    measure()
