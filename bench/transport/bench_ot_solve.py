"""ot_solve: a whole solve, against POT's smooth OT on the same problem. POT gets its own stop (1e-9)
and 500 iterations; ours as many steps as reach POT's value or more on these problems (see
bench_regularized_ot.py for the values). The floor is one read of the cost.
"""

import torch

OP = "ot_solve"
SIZES = {
    torch.float32: [(1, 8, 512, 512, "lbfgs", 500), (1, 48, 1024, 32, "auto", 100),
                    (64, 32, 256, 16, "adam", 20)],
}  # fmt: skip


def test_ot_solve(measure):
    measure()
