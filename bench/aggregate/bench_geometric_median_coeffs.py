"""geometric_median_coeffs: steps on the distances (q, q) in float64; the reference is PyTorch."""

import torch

OP = "geometric_median_coeffs"
SIZES = {torch.float64: [(15, 300), (60, 700)]}


def test_geometric_median_coeffs(measure):
    measure()
