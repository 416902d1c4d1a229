"""centered_clipping_coeffs: steps on the distances (q, q) in float64; the reference is PyTorch."""

import torch

OP = "centered_clipping_coeffs"
SIZES = {torch.float64: [(16, 300), (61, 700)]}


def test_centered_clipping_coeffs(measure):
    measure()
