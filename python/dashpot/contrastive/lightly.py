"""Losses under lightly's names, with its arguments: one import to swap.

from dashpot.contrastive.lightly import KoLeoLoss, NTXentLoss
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from dashpot.contrastive._pairs import check_bool, check_number
from dashpot.contrastive.koleo_loss import koleo_loss
from dashpot.contrastive.nt_xent import nt_xent

__all__ = ["KoLeoLoss", "NTXentLoss"]


class NTXentLoss(nn.Module):
    """NT-Xent of two views. A memory bank is not covered: `info_nce_queue` takes one as a tensor.

    gather_distributed: with more than one process, the keys of all of them, as lightly.
    """

    def __init__(self, temperature: float = 0.5, memory_bank_size: int = 0,
                 gather_distributed: bool = False):  # fmt: skip
        super().__init__()
        self.temperature = check_number(temperature, "temperature")
        if memory_bank_size != 0:
            raise ValueError(f"memory_bank_size: expected 0, got {memory_bank_size}")
        check_bool("gather_distributed", gather_distributed)
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """out0, out1 (B, D) -> loss ()"""
        gather = self.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1
        group = dist.group.WORLD if gather else None
        return nt_xent(out0, out1, temperature=self.temperature, group=group)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}"


class KoLeoLoss(nn.Module):
    """KoLeo with Euclidean distances (p = 2)."""

    def __init__(self, p: float = 2, eps: float = 1e-8):
        super().__init__()
        if p != 2:
            raise ValueError(f"p: expected 2, got {p}")
        self.eps = check_number(eps, "eps")

    def forward(self, x: Tensor) -> Tensor:
        """x (B, D) -> loss ()"""
        return koleo_loss(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"
