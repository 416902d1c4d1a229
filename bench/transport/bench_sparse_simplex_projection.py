"""sparse_simplex_projection: R rows of n, k kept; against the usual form (topk) and
POT's.
"""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "sparse_simplex_projection"
SIZES = {
    torch.float32: [(2, 4096, 64), (2, 2048, 2048), (64, 2048, 2048), (2048, 2048, 2048)],
    torch.bfloat16: [(64, 2048, 2048)],
}


def torch_topk(input, total, k):
    top, indices = input.topk(k, dim=1)  # (R, k)
    ranks = torch.arange(1, k + 1, device=input.device)
    taus = (top.float().cumsum(1) - total[:, None]) / ranks
    rho = (top > taus).sum(1, keepdim=True)
    kept = (top - taus.gather(1, rho - 1)).clamp(min=0).to(input.dtype)
    return torch.zeros_like(input).scatter(1, indices, kept)


def pot(input, total, k):
    utils = peers.load("ot.utils")
    columns = utils.projection_sparse_simplex(
        input.double().numpy(), k, z=total.double().numpy(), axis=1
    )
    return torch.from_numpy(columns)


def on_the_cpu(size, dtype, device, options):
    return device == "cpu" and size[0] < size[2]


PEERS = {"torch topk": Peer(torch_topk), "POT": Peer(pot, on_the_cpu, needs="ot")}


def test_sparse_simplex_projection(measure):
    measure()
