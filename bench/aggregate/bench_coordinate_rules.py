"""coordinate_rules: median and trimmed mean of each coordinate in one read, against what a good
user writes: one sort along the workers, and both from it. byzfl's two calls sort twice."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import sizes

OP = "coordinate_rules"
SIZES = sizes.RULES


def one_sort(grads, mask, p, count, f, rules):
    (rows,) = grads  # (p, d)
    x = rows.sort(dim=0).values
    return [0.5 * (x[(p - 1) // 2] + x[p // 2]), x[f : p - f].mean(0)]


def byzfl(grads, mask, p, count, f, rules):
    (rows,) = grads
    module = peers.load("byzfl")
    return [module.Median()(rows).to(rows.dtype), module.TrMean(f=f)(rows).to(rows.dtype)]


PEERS = {
    "torch.sort": Peer(one_sort, sizes.up_to_a_million),
    "byzfl": Peer(byzfl, sizes.up_to_a_million, needs="byzfl"),
}


def test_coordinate_rules(measure):
    measure()
