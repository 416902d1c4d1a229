"""monna: the mean of the p - f rows nearest to worker 1, against byzfl, which forms the distances
from that one worker alone."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "monna"
SIZES = {torch.float32: [(15, 100_000), (15, 1_000_000)]}


def byzfl(grads, f, idx):
    return peers.load("byzfl").MoNNA(f, idx)(grads).to(grads.dtype)


PEERS = {"byzfl": Peer(byzfl)}


def test_monna(measure):
    measure()
