"""pairwise_sqdist: differences that are never stored, against torch.cdist and broadcasting."""

import torch
from dashpot._measure import Peer

OP = "pairwise_sqdist"
SIZES = {
    # Nothing larger: the reference and cdist take seconds a call there.
    torch.float32: [(15, 100_000), (15, 1_000_000), (7, 1_000_000)],
    torch.bfloat16: [(15, 1_000_000)],
}


def cdist(grads, mask, p, norms):
    (rows,) = grads  # (p, d)
    # The default forms distances from inner products, which cancels for close workers.
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()  # (p, p)


def broadcast(grads, mask, p, norms):
    (rows,) = grads  # (p, d)
    return (rows[:, None] - rows[None, :]).square().sum(-1)  # (p, p, d) -> (p, p)


PEERS = {
    # cdist has no bfloat16; broadcasting stores p * p * d numbers.
    "torch.cdist": Peer(cdist, lambda size, dtype, *_: dtype == torch.float32),
    "broadcast": Peer(broadcast, lambda size, *_: size[1] <= 100_000),
}


def test_pairwise_sqdist(measure):
    measure()
