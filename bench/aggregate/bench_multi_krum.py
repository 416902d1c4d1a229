"""multi_krum: distances in one read, the mean of the p - f selected rows in a second, in the
variants of byzfl (squared distances, p - f - 1 = 11 neighbours of 15 workers) and torchjd (plain
distances, p - f - 2), against both and against what a good user writes."""

from dashpot._measure import Peer

from bench import peers
from bench.aggregate import bench_krum, sizes

OP = "multi_krum"
SIZES = sizes.FLOAT32
OPTIONS = bench_krum.OPTIONS


def torch_gram(grads, f, **options):
    nearest = bench_krum.scores(grads, f, **options).topk(len(grads) - f, largest=False).indices
    return grads[nearest].mean(0)


def byzfl(grads, f, neighbours):
    return peers.load("byzfl").MultiKrum(f)(grads).to(grads.dtype)


def torchjd(grads, f, squared):
    krum = peers.load("torchjd.aggregation").Krum(n_byzantine=f, n_selected=len(grads) - f)
    return krum(grads)


PEERS = {
    "torch X @ X.T": Peer(torch_gram),
    "byzfl": Peer(byzfl, bench_krum.is_byzfls, needs="byzfl"),
    "torchjd": Peer(torchjd, bench_krum.is_torchjds, needs="torchjd"),
}


def test_multi_krum(measure):
    measure()
