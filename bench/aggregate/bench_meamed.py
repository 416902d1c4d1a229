"""meamed: one read and one write, against byzfl and plain PyTorch: median, distances, top-k."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "meamed"
SIZES = {
    torch.float32: [
        (15, 100_000), (15, 1_000_000), (15, 10_000_000), (7, 1_000_000), (60, 1_000_000),
    ],
    torch.bfloat16: [(15, 1_000_000)],
}  # fmt: skip


def topk(grads, f):
    x, p = grads.sort(dim=0).values, len(grads)  # (p, d)
    center = 0.5 * (x[(p - 1) // 2] + x[p // 2])
    nearest = (x - center).abs().topk(p - f, dim=0, largest=False, sorted=False).indices
    return x.gather(0, nearest).mean(0)


def byzfl(grads, f):
    return peers.load("byzfl").Meamed(f=f)(grads).to(grads.dtype)


# Not in bfloat16: equal distances are frequent there, and these take either value.
def float32_up_to_a_million(size, dtype, *_):
    return size[1] <= 1_000_000 and dtype == torch.float32


PEERS = {
    "torch topk": Peer(topk, float32_up_to_a_million),
    "byzfl": Peer(byzfl, lambda size, dtype, *_: size[1] <= 100_000 and dtype == torch.float32),
}


def test_meamed(measure):
    measure()
