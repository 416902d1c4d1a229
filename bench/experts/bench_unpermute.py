"""unpermute: a gather and a weighted sum, against index_add (and, on a GPU, its atomics)."""

import torch
from dashpot._measure import Peer

OP = "unpermute"
SIZES = {
    torch.float32: [(4096, 1, 8, 1, 1024), (2048, 2, 8, 1, 1024), (16_384, 1, 8, 1, 256)],
    torch.bfloat16: [(4096, 2, 8, 1, 1024)],
}


def index_add(h, order, rank, weights):
    k = rank.shape[1]
    kept = order >= 0
    source = torch.where(kept, order, 0)
    if weights is not None:
        h = h * weights.reshape(-1)[source].to(h.dtype)[:, None]
    h = torch.where(kept[:, None], h, 0)
    return h.new_zeros(rank.shape[0], h.shape[1]).index_add_(0, source // k, h)


def gather_and_sum(h, order, rank, weights):
    """(T, k, d) and a sum, as libraries without a kernel do it."""
    kept = rank >= 0
    rows = torch.where(kept[..., None], h[rank.clamp(min=0)], 0)  # (T, k, d)
    return rows.sum(1) if weights is None else (rows * weights[..., None]).sum(1)


def copy(h, order, rank, weights):
    """A yardstick: as many bytes as the op moves, straight, into new memory."""
    return h[: (len(h) + len(rank)) // 2].clone()


PEERS = {
    "index_add": Peer(index_add),
    "h[rank].sum": Peer(gather_and_sum),
    "a copy": Peer(copy, checked=False),
}


def test_unpermute(measure):
    measure()
