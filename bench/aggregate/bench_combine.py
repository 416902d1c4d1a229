"""combine: one read and one write, against the vector-matrix product and the weighted sum."""

import torch
from dashpot._measure import Peer

OP = "combine"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def product(grads, coeffs, p):
    (rows,) = grads  # (p, d)
    return coeffs.to(rows.dtype) @ rows  # (d,)


def weighted_sum(grads, coeffs, p):
    (rows,) = grads  # (p, d)
    return (coeffs.to(rows.dtype)[:, None] * rows).sum(0)  # (d,), stores p * d numbers


PEERS = {
    "c @ X": Peer(product),
    "(c * X).sum(0)": Peer(weighted_sum, lambda size, *_: size[1] <= 1_000_000),
}


def test_combine(measure):
    measure()
