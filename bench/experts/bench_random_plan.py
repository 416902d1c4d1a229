"""random_plan: the plan of routes that are not stored, against both ops one after the other."""

import torch
from dashpot import dispatch_plan, route_random
from dashpot._measure import Peer

OP = "random_plan"
SIZES = {
    torch.float32: [(8, 1, 0, 2, -1, "token", 1, 65_536), (64, 2, 0, 1, -1, "token", 1, 65_536)]
}


def route_then_plan(seed, offset, units, experts, top_k, replace, passes, capacity, *options):
    ids = route_random(
        units, experts, top_k=top_k, replace=replace, num_passes=passes, seed=seed, offset=offset
    )
    return dispatch_plan(
        ids, experts, capacity=capacity, **dict(zip(("priority", "align"), options, strict=True))
    )


PEERS = {"route_random, dispatch_plan": Peer(route_then_plan)}


def test_random_plan(measure):
    measure()
