"""regularized_ot: a solve of a fixed number of steps, the router's recipe and Sinkhorn. Against
POT, at equal objectives, it is timed by bench/models/ot_solvers.py. The floor is one read of the
cost: what a solver that kept it on the chip would do.
"""

import torch

OP = "regularized_ot"
SIZES = {
    torch.float32: [(1, 32, "adam", "semi_dual", 20, 256, 16),
                    (64, 32, "adam", "semi_dual", 20, 256, 16),
                    (1, "negentropy", "sinkhorn", "semi_dual", 20, 512, 512)],
}  # fmt: skip


def test_regularized_ot(measure):
    measure()
