"""Modules of the family: the functions with their options held.

InfoNCE()(query, key)    NTXent(temperature)(z1, z2)    KoLeo()(z)
RegularizedInfoNCE(temperature, koleo_weight)(z1, z2, subject_ids)

Under other libraries' names: `metric_learning`, `lightly`, `open_clip`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dashpot.contrastive.info_nce import info_nce
from dashpot.contrastive.koleo_loss import koleo_loss
from dashpot.contrastive.nt_xent import nt_xent
from dashpot.contrastive.regularized_info_nce import regularized_info_nce


class InfoNCE(nn.Module):
    """`info_nce` with its options; `learnable=True` makes log(1 / temperature) a parameter."""

    def __init__(self, temperature: float = 0.04, *, symmetric: bool = False,
                 normalize: bool = True, learnable: bool = False, reduction: str = "mean",
                 group=None):  # fmt: skip
        super().__init__()
        self.temperature, self.group = temperature, group
        self.options = {"symmetric": symmetric, "normalize": normalize, "reduction": reduction}
        start = torch.tensor(1 / temperature).log() if learnable else None
        self.log_scale = nn.Parameter(start) if learnable else None

    def forward(self, query: Tensor, key: Tensor, positives: Tensor | None = None) -> Tensor:
        scale = None if self.log_scale is None else self.log_scale.exp()
        return info_nce(
            query, key, temperature=self.temperature, positives=positives, logit_scale=scale,
            group=self.group, **self.options,
        )  # fmt: skip


class NTXent(nn.Module):
    """`nt_xent` with its options (temperature 0.5: lightly's)."""

    def __init__(self, temperature: float = 0.5, *, within_view: bool = True,
                 mask_cross_view: bool = False, group=None):  # fmt: skip
        super().__init__()
        self.temperature, self.group = temperature, group
        self.options = {"within_view": within_view, "mask_cross_view": mask_cross_view}

    def forward(self, out0: Tensor, out1: Tensor, subject_ids: Tensor | None = None) -> Tensor:
        return nt_xent(
            out0, out1, temperature=self.temperature, subject_ids=subject_ids, group=self.group,
            **self.options,
        )  # fmt: skip


class KoLeo(nn.Module):
    """`koleo_loss` with its options."""

    def __init__(self, topk: int = 1, *, eps: float = 1e-8, group=None):
        super().__init__()
        self.options = {"topk": topk, "eps": eps, "group": group}

    def forward(self, x: Tensor) -> Tensor:
        return koleo_loss(x, **self.options)


class RegularizedInfoNCE(nn.Module):
    """`regularized_info_nce` with its options."""

    def __init__(self, temperature: float = 0.04, koleo_weight: float = 0.1, **options):
        super().__init__()
        self.options = {"temperature": temperature, "koleo_weight": koleo_weight, **options}

    def forward(self, z1: Tensor, z2: Tensor, subject_ids: Tensor | None = None) -> Tensor:
        return regularized_info_nce(z1, z2, subject_ids=subject_ids, **self.options)
