"""mda_coeffs: the exact search on the distances (p, p) in float64; the reference enumerates."""

import torch

OP = "mda_coeffs"
SIZES = {torch.float64: [(15, 300)]}


def test_mda_coeffs(measure):
    measure()
