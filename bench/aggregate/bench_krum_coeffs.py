"""krum_coeffs: ranks among the distances (p, p) in float64; the reference sorts."""

import torch

OP = "krum_coeffs"
SIZES = {torch.float64: [(15, 300), (60, 700)]}


def test_krum_coeffs(measure):
    measure()
