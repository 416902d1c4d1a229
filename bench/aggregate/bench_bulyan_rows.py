"""bulyan_rows: a problem of p x p numbers; there is no peer that takes distances."""

import torch

OP = "bulyan_rows"
SIZES = {torch.float64: [(7, 300), (15, 300), (60, 700)]}


def test_bulyan_rows(measure):
    measure()
