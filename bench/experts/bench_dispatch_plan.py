"""dispatch_plan: a counting sort, against sort, bincount, cumsum and the inverse."""

import torch
from dashpot._measure import Peer

OP = "dispatch_plan"
SIZES = {torch.float32: [(64, 1, -1, "choice", 1, 65_536), (64, 2, -1, "choice", 1, 65_536)]}


def sorted_plan(expert_idx, scores, num_experts, capacity, priority, align):
    """Ids -1 as a group of their own behind the others, as libraries mask them."""
    flat = expert_idx.reshape(-1)
    flat = torch.where(flat < 0, num_experts, flat)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = counts.cumsum(0)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(flat.numel(), device=flat.device)
    kept = rank < offsets[-1]
    order = torch.where(torch.arange(flat.numel(), device=flat.device) < offsets[-1], order, -1)
    rank = torch.where(kept, rank, -1).reshape(expert_idx.shape)
    return counts.int(), counts.int(), offsets.int(), order.int(), rank.int()


def bare(expert_idx, scores, num_experts, *_):
    """The four calls alone, a yardstick: ids -1 are miscounted, results have 64 bits."""
    flat = expert_idx.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat.clamp(min=0), minlength=num_experts)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(flat.numel(), device=flat.device)
    return counts, counts.cumsum(0), order, rank


PEERS = {
    "sort + bincount": Peer(sorted_plan),
    "the calls alone": Peer(bare, checked=False),
}


def test_dispatch_plan(measure):
    measure()
