"""ot_value_grad: one evaluation of points, whose cost is never stored, against storing it: made by
`torch.cdist` and evaluated by plain PyTorch (topk, scatter), or by `ot_semidual_value_grad`. Sizes
(batch, k, function, metric, d, m, n). "inner" has no subtraction: the price of not cancelling.
"""

import torch
from dashpot import functional as F
from dashpot._measure import Peer

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
    s = alpha[:, :, None] - cost_of(x, y, metric)  # (B, m, n)
    top, rows = s.topk(k, dim=1)  # (B, k, n)
    ranks = torch.arange(1, k + 1, device=s.device, dtype=s.dtype)[:, None]
    taus = (top.cumsum(1) - gamma * b[:, None]) / ranks
    rho = (top > taus).sum(1, keepdim=True)
    theta = taus.gather(1, (rho - 1).clamp(min=0))  # (B, 1, n)
    t = (top - theta).clamp(min=0) / gamma
    plan = torch.zeros_like(s).scatter(1, rows, t)
    value = (t * (top + theta) / 2 * (t > 0)).sum((1, 2))
    return (a * alpha).sum(1) - value, a - plan.sum(2), -theta.squeeze(1)


PEERS = {"cdist, then ours": Peer(stored), "cdist, torch topk": Peer(torch_topk)}


def test_ot_value_grad(measure):
    measure()
