"""coordinate_median: one read and one write, against torch.median, a sort, and byzfl.

torch.median takes the lower middle value of an even number of workers: it is timed for odd ones."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "coordinate_median"
SIZES = sizes.RULES


def torch_median(grads):
    return grads.median(dim=0).values  # (d,)


def sort(grads):
    x, p = grads.sort(dim=0).values, len(grads)  # (p, d)
    return 0.5 * (x[(p - 1) // 2] + x[p // 2])


def byzfl(grads):
    return peers.load("byzfl").Median()(grads).to(grads.dtype)


PEERS = {
    "torch.median": Peer(torch_median, lambda size, *_: size[1] <= 1_000_000 and size[0] % 2),
    "torch.sort": Peer(sort, sizes.up_to_a_million),
    "byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl"),
}


def test_coordinate_median(measure):
    measure()
