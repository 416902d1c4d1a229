"""expert_mlp at inference: against every expert on every token (the published code) and loops."""

import torch
from dashpot._measure import Peer
from torch.nn import functional

from bench import peers

OP = "expert_mlp"
SIZES = {
    torch.float32: [(4096, 1, 8, 1, "relu", 0, 1024, 256)],
    torch.bfloat16: [(4096, 1, 8, 1, "relu", 0, 1024, 256)],
}


def _ids(order, rank, offsets):
    """(T,) the expert of each token, from the plan."""
    return torch.searchsorted(offsets, rank[:, 0].contiguous(), right=True)


def every_expert(x, order, rank, offsets, w1, b1, w2, b2, *_):
    """Outputs of all experts stacked, masked, summed."""
    ids = _ids(order, rank, offsets)
    stack = torch.stack(
        [
            functional.linear(functional.relu(functional.linear(x, w1[e], b1[e])), w2[e], b2[e])
            for e in range(len(w1))
        ]
    )
    for e in range(len(w1)):
        stack[e] *= ((ids == e) & (rank[:, 0] >= 0))[:, None]
    return stack.sum(0)


def loop(x, order, rank, offsets, w1, b1, w2, b2, *_):
    """Tokens of each expert by nonzero, the usual loop."""
    ids = _ids(order, rank, offsets)
    y = torch.zeros_like(x)
    for e in range(len(w1)):
        mine = ((ids == e) & (rank[:, 0] >= 0)).nonzero()[:, 0]
        z = functional.relu(functional.linear(x[mine], w1[e], b1[e]))
        y[mine] = functional.linear(z, w2[e], b2[e])
    return y


def sorted_loop(x, order, rank, offsets, w1, b1, w2, b2, *_):
    """The best loop by hand: rows sorted once, fused bias, activation in place."""
    ends = offsets.tolist()
    tokens = order[: ends[-1]].long()
    rows, out, begin = x[tokens], torch.empty_like(x[: ends[-1]]), 0
    for e, end in enumerate(ends):
        z = torch.addmm(b1[e], rows[begin:end], w1[e].t()).relu_()
        torch.addmm(b2[e], z, w2[e].t(), out=out[begin:end])
        begin = end
    y = torch.zeros_like(x)
    y[tokens] = out
    return y


def grouped_mm(x, order, rank, offsets, w1, b1, w2, b2, *_):
    """Rows sorted, two calls of torch's grouped product, which takes no bias."""
    expert = torch.searchsorted(offsets, torch.arange(len(order), device=x.device), right=True)
    expert = expert.clamp(max=len(w1) - 1)
    z = functional.grouped_mm(x[order.clamp(min=0)], w1.mT, offs=offsets)
    z = functional.relu(z + b1[expert])
    out = functional.grouped_mm(z, w2.mT, offs=offsets) + b2[expert]
    return torch.where(rank >= 0, out[rank[:, 0].clamp(min=0)], 0)


def has_grouped_mm(size, dtype, device, options):
    """On a GPU other dtypes go through a loop on the host."""
    return hasattr(functional, "grouped_mm") and (dtype == torch.bfloat16 or device == "cpu")


def products(x, order, rank, offsets, w1, b1, w2, *_):
    """A yardstick: two products of as many operations, of one expert, and nothing beside them."""
    return x @ w1[0].t() @ w2[0].t()


def scattermoe(x, order, rank, offsets, w1, b1, w2, b2, *_):
    """Its two fused products (version 0.3, which adds biases), float32 in TF32 by its default."""
    experts = peers.load("scattermoe.parallel_experts")
    ids = _ids(order, rank, offsets)[:, None]
    plan = experts.flatten_sort_count(ids, num_experts=len(w1))
    z = experts.parallel_linear(x, w1.mT, 1, *plan, expert_biases=b1, grouped_out=True)
    y = experts.parallel_linear(
        functional.relu(z), w2.mT, 1, *plan, expert_biases=b2, grouped_in=True
    )
    return y * (rank >= 0)


PEERS = {
    "every expert": Peer(every_expert),
    "loop": Peer(loop),
    "sorted loop": Peer(sorted_loop),
    "F.grouped_mm": Peer(grouped_mm, has_grouped_mm),
    "the products alone": Peer(products, checked=False),
    "scattermoe": Peer(scattermoe, peers.on_a_gpu, needs="scattermoe"),
}


def test_expert_mlp(measure):
    measure()
