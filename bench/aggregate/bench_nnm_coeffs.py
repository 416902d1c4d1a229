"""nnm_coeffs: ranks among the distances (p, p) in float64; the reference sorts."""

import torch

OP = "nnm_coeffs"
SIZES = {torch.float64: [(15, 300), (60, 700)]}


def test_nnm_coeffs(measure):
    measure()
