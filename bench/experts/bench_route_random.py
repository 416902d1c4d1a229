"""route_random: seed and offset in, ids out. Beside it what torch's own generator takes for as many
numbers, which repeat within a row and depend on the device."""

import torch
from dashpot._measure import Peer

OP = "route_random"
SIZES = {torch.float32: [(8, 1, 0, 1, 65_536), (64, 2, 0, 2, 65_536)]}


def randint(seed, offset, units, experts, top_k, replace, passes):
    return torch.randint(experts, (passes * units, top_k), dtype=torch.int32, device=seed.device)


PEERS = {"torch.randint": Peer(randint, checked=False)}


def test_route_random(measure):
    measure()
