"""permute: a gather of rows, against index_select and a plain copy.

Results of 32 MiB and more come from fresh pages on the CPU, which costs every contender more than
the copy itself: the sizes stay below.
"""

import torch
from dashpot._measure import Peer

OP = "permute"
SIZES = {
    torch.float32: [(4096, 1, 8, 1, 1024), (2048, 2, 8, 1, 1024), (16_384, 1, 8, 1, 256)],
    torch.bfloat16: [(4096, 2, 8, 1, 1024)],
}


def index_select(x, order, rank):
    return x.index_select(0, order.clamp(min=0) // rank.shape[1]) * (order >= 0)[:, None]


def index_select_alone(x, order, rank):
    """A yardstick: no zeros for padding and dropped choices."""
    return x.index_select(0, order.clamp(min=0) // rank.shape[1])


def copy(x, order, rank):
    """A yardstick: as many bytes as the op moves, straight, into new memory."""
    return x.clone(), x[: max(0, len(order) - len(x)) // 2].clone()


PEERS = {
    "index_select": Peer(index_select),
    "index_select alone": Peer(index_select_alone, checked=False),
    "a copy": Peer(copy, checked=False),
}


def test_permute(measure):
    measure()
