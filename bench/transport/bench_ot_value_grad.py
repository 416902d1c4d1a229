"""ot_value_grad: one evaluation of points, whose cost is never stored, against storing it: made by
`torch.cdist` and evaluated by plain PyTorch (topk, scatter), or by `ot_semidual_value_grad`. Sizes
(batch, k, function, metric, d, m, n). "inner" has no subtraction: the price of not cancelling.
"""

import torch
from dashpot import functional as F
from dashpot._measure import Peer

from bench.transport.bench_ot_semidual_value_grad import torch_topk as topk_of_stored

OP = "ot_value_grad"
SIZES = {
    torch.float32: [
        (1, 2, "semi_dual", "sqeuclidean", 3, 512, 512),
        (1, 2, "semi_dual", "sqeuclidean", 3, 2048, 2048),
        (1, 2, "semi_dual", "sqeuclidean", 64, 2048, 2048),
        (1, 2, "semi_dual", "inner", 64, 2048, 2048),
    ],
}  # fmt: skip


def cost_of(x, y, metric):
    return -(x @ y.mT) if metric == "inner" else torch.cdist(x, y).square()


def stored(alpha, beta, x, y, a, b, smoothing, level, metric, reg, gamma, k):
    return F.ot_semidual_value_grad(alpha, cost_of(x, y, metric), a, b, gamma=gamma, max_nz=k)


def torch_topk(alpha, beta, x, y, a, b, smoothing, level, metric, reg, gamma, k):
    """As a user would write it."""
    return topk_of_stored(alpha, cost_of(x, y, metric), a, b, reg, gamma, k)


PEERS = {"cdist, then ours": Peer(stored), "cdist, torch topk": Peer(torch_topk)}


def test_ot_value_grad(measure):
    measure()
