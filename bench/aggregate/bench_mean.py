"""mean: it looks for NaN and inf first, which torch.mean and byzfl do not, and so reads twice."""

import torch
from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "mean"
SIZES = sizes.FLOAT32


def finite_mean(grads):
    """The same contract in PyTorch."""
    finite = grads.isfinite().all(1)  # (p,)
    return torch.where(finite[:, None], grads, 0).sum(0) / finite.sum()


def byzfl(grads):
    return peers.load("byzfl").Average()(grads).to(grads.dtype)


PEERS = {
    "mean of finite rows": Peer(finite_mean),
    "torch.mean": Peer(lambda grads: grads.mean(0)),
    "byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl"),
}


def test_mean(measure):
    measure()
