"""route_balanced: a random order cut into E parts."""

import torch

OP = "route_balanced"
SIZES = {torch.float32: [(8, 65_536)]}


def test_route_balanced(measure):
    measure()
