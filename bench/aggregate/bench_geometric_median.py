"""geometric_median: up to 100 steps in two reads. The peers read all rows in every step, and get
five, which bring them to a hundredth of the median here."""

import torch
from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "geometric_median"
SIZES = sizes.RULES
STEPS = 5


def torch_gram(grads):
    """Five steps on the Gram matrix, as a user who knows of it would write them."""
    k = (grads @ grads.mT).double()  # (p, p)
    c = torch.full_like(k[0], 1 / len(k))
    for _ in range(STEPS):
        image = k @ c
        distance = (k.diagonal() - 2 * image + c @ image).clamp(min=0).sqrt()
        c = 1 / distance.clamp(min=1e-6)
        c = c / c.sum()
    return c.to(grads.dtype) @ grads


def torch_steps(grads):
    z = grads.mean(0)
    for _ in range(STEPS):
        w = 1 / (grads - z).norm(dim=1).clamp(min=1e-6)
        z = (w / w.sum()) @ grads
    return z


def byzfl(grads):
    return peers.load("byzfl").GeometricMedian(1e-6, STEPS)(grads).to(grads.dtype)


def geom_median(grads):
    compute = peers.load("geom_median.torch").compute_geometric_median
    return compute(grads, maxiter=STEPS).median


PEERS = {
    "torch gram": Peer(torch_gram),
    "torch": Peer(torch_steps, sizes.float32_up_to_a_million),
    "byzfl": Peer(byzfl, sizes.float32_up_to_a_million, needs="byzfl"),
    "geom-median": Peer(geom_median, sizes.float32_up_to_a_million, needs="geom_median"),
}


def test_geometric_median(measure):
    measure()
