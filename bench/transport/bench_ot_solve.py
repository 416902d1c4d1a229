"""ot_solve: a whole solve. bench_regularized_ot.py has the peers and the values reached; here the
floor, one read of the cost, and the reference beside the kernels.
"""

import torch

OP = "ot_solve"
SIZES = {
    torch.float32: [(1, 8, 512, 512, "lbfgs", 500), (1, 48, 1024, 32, "auto", 100),
                    (64, 32, 256, 16, "adam", 20)],
}  # fmt: skip


def test_ot_solve(measure):
    measure()
