"""route_random: seed and offset in, ids out."""

import torch

OP = "route_random"
SIZES = {torch.float32: [(8, 1, 0, 1, 65_536), (64, 2, 0, 2, 65_536)]}


def test_route_random(measure):
    measure()
