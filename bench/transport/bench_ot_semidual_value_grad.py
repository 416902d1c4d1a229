"""ot_semidual_value_grad: one evaluation, against plain PyTorch (topk, cumsum, scatter) and POT's.
Sizes (batch, k, m, n) are the specification's table; without k: l2 and negative entropy. The floor
is one read of the cost.
"""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "ot_semidual_value_grad"
SIZES = {
    torch.float32: [
        (1, 2, 64, 64), (1, 8, 64, 64), (1, 8, 512, 512), (1, 32, 1024, 32), (1, 48, 1024, 32),
        (1, 2, 2048, 2048), (64, 32, 256, 16), (1, "l2", 512, 512),
    ],
    torch.float64: [(1, 8, 512, 512)],
    torch.bfloat16: [(1, 2, 2048, 2048)],
}  # fmt: skip


def torch_topk(alpha, cost, a, b, reg, gamma, k):
    """As a user would write it."""
    s = alpha[:, :, None] - cost  # (B, m, n)
    top, rows = s.topk(k, dim=1)  # (B, k, n)
    ranks = torch.arange(1, k + 1, device=s.device, dtype=s.dtype)[:, None]
    taus = (top.cumsum(1) - gamma * b[:, None]) / ranks
    rho = (top > taus).sum(1, keepdim=True)
    theta = taus.gather(1, (rho - 1).clamp(min=0))  # (B, 1, n)
    t = (top - theta).clamp(min=0) / gamma
    plan = torch.zeros_like(s).scatter(1, rows, torch.where(b[:, None] > 0, t, 0))
    chosen = torch.where(plan > 0, s, 0)
    value = (plan * chosen).sum((1, 2)) - gamma / 2 * plan.square().sum((1, 2))
    beta = -torch.where(b[:, None] > 0, theta, top[:, :1]).squeeze(1)
    return (a * alpha).sum(1) - value, a - plan.sum(2), beta


def pot(alpha, cost, a, b, reg, gamma, k):
    """POT's evaluation, one problem; its arrays are NumPy's float64."""
    smooth = peers.load("ot.smooth")
    regularizer = smooth.SparsityConstrained(gamma=gamma, max_nz=k)
    arrays = (x[0].double().numpy() for x in (alpha, a, b, cost))
    value, grad = smooth.semi_dual_obj_grad(*arrays, regularizer)
    return torch.tensor([value]), torch.from_numpy(grad)[None]


def one_problem(size, dtype, device, options):
    """What POT takes: one problem, k < m, masses and costs that are positive and finite."""
    return size[0] == 1 and size[1] != size[2] and isinstance(size[1], int) and device == "cpu"


def a_read(alpha, cost, a, b, reg, gamma, k):
    """The cost read once."""
    return cost.sum()


PEERS = {
    "torch topk": Peer(torch_topk, lambda size, dtype, device, options: size[1] != "l2"),
    "a read": Peer(a_read, checked=False),
    "POT": Peer(pot, one_problem, needs="ot"),
}


def test_ot_semidual_value_grad(measure):
    measure()
