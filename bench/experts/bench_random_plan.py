"""random_plan: the plan of routes that are not stored."""

import torch

OP = "random_plan"
SIZES = {
    torch.float32: [(8, 1, 0, 2, -1, "token", 1, 65_536), (64, 2, 0, 1, -1, "token", 1, 65_536)]
}


def test_random_plan(measure):
    measure()
