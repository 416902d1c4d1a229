"""regularized_ot: a solve of a fixed number of steps, the router's recipe and Sinkhorn. Against
POT, at equal objectives, it is timed by bench/models/ot_solvers.py. The floor is one read of the
cost: what a solver that kept it on the chip would do.
"""

import torch

OP = "regularized_ot"
SIZES = {
    torch.float32: [(1, 32, 256, 16, "adam", 20), (64, 32, 256, 16, "adam", 20),
                    (1, "negentropy", 512, 512, "sinkhorn", 20)],
}  # fmt: skip


def test_regularized_ot(measure):
    measure()
