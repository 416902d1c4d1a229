"""regularized_ot_points: solves of a fixed number of steps from points, against the same solve of
a cost stored by `torch.cdist`, and POT's (ot.dist, then ot.smooth's semi-dual by SciPy's L-BFGS-B,
as many steps; it prints, and checks nothing here, as its steps are others). Sizes (batch, k,
metric, solver, steps, d, m, n).
"""

import contextlib
import io

import torch
from dashpot import functional as F
from dashpot._measure import Peer

from bench import peers

OP = "regularized_ot_points"
SIZES = {
    torch.float32: [
        (1, 8, "sqeuclidean", "lbfgs", 20, 3, 256, 256),
        (1, 8, "sqeuclidean", "lbfgs", 20, 64, 256, 256),
        (1, 2, "sqeuclidean", "adam", 10, 3, 1024, 1024),
    ],
}  # fmt: skip


def stored(x, y, a, b, metric, reg, gamma, k, solver, max_iter):
    out = F.regularized_ot(
        torch.cdist(x, y).square(), a, b, reg=reg, gamma=gamma, max_nz=k, solver=solver,
        max_iter=max_iter, differentiable=None,
    )  # fmt: skip
    return out.alpha, out.value, out.plan.values


def pot(x, y, a, b, metric, reg, gamma, k, solver, max_iter):
    ot, smooth = peers.load("ot"), peers.load("ot.smooth")
    x, y, a, b = (one[0].double().numpy() for one in (x, y, a, b))
    with contextlib.redirect_stdout(io.StringIO()):
        alpha, _ = smooth.solve_semi_dual(
            a, b, ot.dist(x, y, metric=metric), smooth.SparsityConstrained(max_nz=k, gamma=gamma),
            tol=1e-9, max_iter=max_iter,
        )  # fmt: skip
    return torch.from_numpy(alpha)


def with_lbfgs(size, dtype, device, options):
    return device == "cpu" and size[3] == "lbfgs"


PEERS = {
    "cdist, then ours": Peer(stored, checked=False),
    "POT": Peer(pot, with_lbfgs, checked=False, needs="ot"),
}


def test_regularized_ot_points(measure):
    measure()
