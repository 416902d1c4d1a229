"""ot_plan: the nonzeros of a plan from potentials, against a dense plan's topk. The floor is one
read of the cost and one write of the places."""

import torch
from dashpot._measure import Peer

OP = "ot_plan"
SIZES = {torch.float32: [(1, 8, 512, 512), (1, 48, 1024, 32), (1, 2, 2048, 2048)]}


def torch_topk(cost, b, alpha, beta, by_rows, reg, gamma, k, *_):
    """As a user would write it."""
    top, rows = (alpha[:, :, None] - cost).topk(k, dim=1)  # (B, k, n)
    ranks = torch.arange(1, k + 1, device=top.device, dtype=top.dtype)[:, None]
    taus = (top.cumsum(1) - gamma * b[:, None]) / ranks
    rho = (top > taus).sum(1, keepdim=True)
    theta = taus.gather(1, (rho - 1).clamp(min=0))  # (B, 1, n)
    values = torch.where(b[:, None] > 0, (top - theta).clamp(min=0) / gamma, 0)
    return torch.where(values > 0, rows, -1).int(), values


PEERS = {"torch topk": Peer(torch_topk)}


def test_ot_plan(measure):
    measure()
