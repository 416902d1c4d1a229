"""grouped_linear: one product a segment, against a loop of layers and torch's grouped_mm."""

import torch
from dashpot._measure import Peer
from torch.nn import functional

OP = "grouped_linear"
SIZES = {torch.float32: [(4096, 8, 1024, 256)], torch.bfloat16: [(4096, 8, 1024, 256)]}


def loop(xp, weight, bias, offsets):
    """Reads the ends on the host."""
    out, begin = torch.zeros(len(xp), weight.shape[1], dtype=xp.dtype, device=xp.device), 0
    for e, end in enumerate(offsets.tolist()):
        out[begin:end] = functional.linear(xp[begin:end], weight[e], bias[e])
        begin = end
    return out


def grouped_mm(xp, weight, bias, offsets):
    """It takes no bias yet, and leaves rows past the end undefined on CUDA."""
    y = functional.grouped_mm(xp, weight.mT, offs=offsets)
    row = torch.arange(len(xp), device=xp.device)
    expert = torch.searchsorted(offsets, row, right=True)
    inside = (expert < len(weight))[:, None]
    return torch.where(inside, y + bias[expert.clamp(max=len(weight) - 1)], 0)


def has_grouped_mm(size, dtype, device, options):
    """On a GPU other dtypes go through a loop on the host."""
    return hasattr(functional, "grouped_mm") and (dtype == torch.bfloat16 or device == "cpu")


PEERS = {"loop": Peer(loop), "F.grouped_mm": Peer(grouped_mm, has_grouped_mm)}


def test_grouped_linear(measure):
    measure()
