"""flag_coeffs: the solve on the Gram matrix (p, p) in float64; the reference is LAPACK's eigh."""

import torch

OP = "flag_coeffs"
SIZES = {torch.float64: [(7, 300), (15, 300), (60, 700)]}


def test_flag_coeffs(measure):
    measure()
