"""ot_dual_value_grad: one evaluation, against plain PyTorch (topk, scatter) and POT's. Sizes
(batch, k, m, n) as for the semi-dual; the floor is one read of the cost.
"""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "ot_dual_value_grad"
SIZES = {
    torch.float32: [
        (1, 2, 64, 64), (1, 8, 512, 512), (1, 48, 1024, 32), (1, 2, 2048, 2048),
        (64, 32, 256, 16), (1, "negentropy", 512, 512),
    ],
    torch.bfloat16: [(1, 2, 2048, 2048)],
}  # fmt: skip


def torch_topk(alpha, beta, cost, a, b, reg, gamma, k):
    s = alpha[:, :, None] + beta[:, None] - cost  # (B, m, n)
    linear = (a * alpha).sum(1) + (b * beta).sum(1)
    if reg == "negentropy":
        plan = torch.exp(s / gamma - 1)
        return linear - gamma * plan.sum((1, 2)), a - plan.sum(2), b - plan.sum(1)
    top, rows = s.topk(k, dim=1)
    t = top.clamp(min=0) / gamma  # (B, k, n)
    plan = torch.zeros_like(s).scatter(1, rows, t)
    return linear - gamma / 2 * t.square().sum((1, 2)), a - plan.sum(2), b - t.sum(1)


def pot(alpha, beta, cost, a, b, reg, gamma, k):
    smooth = peers.load("ot.smooth")
    regularizer = smooth.SparsityConstrained(gamma=gamma, max_nz=k)
    arrays = (x[0].double().numpy() for x in (alpha, beta, a, b, cost))
    value, *grads = smooth.dual_obj_grad(*arrays, regularizer)
    return torch.tensor([value]), *(torch.from_numpy(grad)[None] for grad in grads)


def one_problem(size, dtype, device, options):
    return size[0] == 1 and size[1] != size[2] and isinstance(size[1], int) and device == "cpu"


PEERS = {"torch": Peer(torch_topk), "POT": Peer(pot, one_problem, needs="ot")}


def test_ot_dual_value_grad(measure):
    measure()
