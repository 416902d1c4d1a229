"""regularized_ot: a whole solve, against POT's smooth OT on the same problem, with its stop (1e-9)
and 500 iterations: a yardstick, not checked, for solvers stop at different points. That ours is no
worse is in tests/transport/test_regularized_ot.py. Of "auto" 100 steps, which pass POT's value on a
router's problem. The floor is one read of the cost.
"""

import contextlib
import io

import torch
from dashpot._measure import Peer

from bench import peers

OP = "regularized_ot"
SIZES = {
    torch.float64: [(1, 8, 64, 64, "lbfgs", 500), (1, 8, 512, 512, "lbfgs", 500),
                    (1, 48, 1024, 32, "auto", 100)],
    torch.float32: [(1, 8, 512, 512, "lbfgs", 500), (64, 32, 256, 16, "adam", 20)],
}  # fmt: skip


def pot(cost, a, b, alpha, beta, by_rows, reg, gamma, k, *_):
    """POT's semi-dual; its arrays are NumPy's float64. It prints on every evaluation."""
    smooth = peers.load("ot.smooth")
    regularizer = smooth.SparsityConstrained(gamma=gamma, max_nz=k)
    arrays = (x[0].double().numpy() for x in (a, b, cost))
    with contextlib.redirect_stdout(io.StringIO()):
        found, _ = smooth.solve_semi_dual(*arrays, regularizer, tol=1e-9, max_iter=500)
    return torch.from_numpy(found)


def one_problem(size, dtype, device, options):
    return size[0] == 1 and device == "cpu"


PEERS = {}
if peers.has("ot.smooth"):
    PEERS["POT"] = Peer(pot, one_problem, checked=False)


def test_regularized_ot(measure):
    measure()
