"""gram: one read of the rows, against the matrix products that a user would write."""

import torch
from dashpot._measure import Peer

OP = "gram"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def product(grads, mask, p, accum):
    (rows,) = grads  # (p, d)
    return rows @ rows.mT  # (p, p), sums in the input's dtype


def double_product(grads, mask, p, accum):
    rows = grads[0].double()  # (p, d)
    return rows @ rows.mT  # (p, p)


PEERS = {
    "X @ X.T": Peer(product),
    "X.double()": Peer(double_product, lambda size, *_: size[1] <= 1_000_000),
}


def test_gram(measure):
    measure()
