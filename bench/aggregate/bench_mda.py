"""mda: distances, the exact subset, its mean, against byzfl, which enumerates subsets."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "mda"
SIZES = {torch.float32: [(15, 100_000), (15, 1_000_000)]}


def byzfl(grads, f):
    return peers.load("byzfl").MDA(f)(grads).to(grads.dtype)


PEERS = {"byzfl": Peer(byzfl)}


def test_mda(measure):
    measure()
