"""`supcon_loss`: `focal_supcon_loss` with flat weights; Modules with the peers' signatures."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.contrastive._grouped import GROUP_SIZES, rows_of
from dashpot.contrastive._pairs import check_choice, check_number, unit_rows
from dashpot.contrastive.focal_supcon_loss import (
    FOCAL_SUPCON_LOSS,
    _focal_supcon,
    _focal_supcon_loss_floor,
)


@public
def supcon_loss(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.07,
    normalize: bool = False,
    anchors: Literal["with_positives", "all"] = "with_positives",
) -> Tensor:
    r"""Supervised contrastive loss, without the N x N matrix.

    .. math:: L = -\frac{1}{A} \sum_i \frac{1}{|P(i)|} \sum_{j \in P(i)} \log p_{ij}, \qquad
              p_{ij} = \frac{e^{z_i \cdot z_j / \tau}}{\sum_{k \ne i} e^{z_i \cdot z_k / \tau}}

    with P(i) the other rows of i's label; a row without any adds 0.

    Args:
        z: (N, d) rows; float64, float32, bfloat16 or float16. Expected to have length 1.
        labels: (N,) integers.
        temperature: tau > 0.
        normalize: divide each row by its length first (1e-12 at least).
        anchors: what A counts: "with_positives", rows with a positive (pytorch-metric-learning);
            "all", all N rows (SupContrast).

    Returns:
        The loss (), float32, or float64 for float64 inputs; 0 with zero gradient if no row has a
        positive.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Supervised Contrastive Learning, arXiv 2004.11362, its form L_out.
    """
    check_choice("anchors", anchors, ("with_positives", "all"))
    return _focal_supcon(z, labels, "labels", temperature, 0.0, True, anchors == "all", normalize,
                         "mean")  # fmt: skip


def _supcon_loss_inputs(size, dtype, device, seed):
    """Rows and labels: the options keep their defaults, which expect rows of length 1."""
    z, labels = rows_of(size, dtype, device, seed)
    return unit_rows(z).to(dtype), labels


SUPCON_LOSS = chain(
    "supcon_loss",
    supcon_loss,
    (FOCAL_SUPCON_LOSS,),
    inputs=_supcon_loss_inputs,
    floor=_focal_supcon_loss_floor,
    sizes=GROUP_SIZES,
)


class MultiViewSupConLoss(nn.Module):
    """The supervised contrastive loss of several views, called as SupContrast's SupConLoss.

    Args:
        temperature, base_temperature: the loss is multiplied by their ratio.
        contrast_mode: "all": each view is an anchor; "one": only the first.
    """

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all",
                 base_temperature: float = 0.07):  # fmt: skip
        super().__init__()
        check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.temperature = check_number(temperature, "temperature")
        self.contrast_mode = contrast_mode
        self.base_temperature = check_number(base_temperature, "base_temperature")

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """features (B, views, ...) of length 1, labels (B,) or none (the views of a sample are its
        only positives) -> loss (), the mean over all anchors."""
        if not isinstance(features, Tensor):
            raise TypeError(f"features: expected a torch.Tensor, got {type(features).__name__}")
        if features.dim() < 3:
            raise ValueError(f"features: expected (B, views, ...), got {tuple(features.shape)}")
        batch, views = features.shape[:2]
        if labels is None:
            labels = torch.arange(batch, device=features.device)
        elif not isinstance(labels, Tensor) or labels.numel() != batch:
            got = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"labels: expected ({batch},), got {got}")
        z = features.flatten(2).transpose(0, 1).flatten(0, 1)  # (views * B, d), view by view
        ids = labels.reshape(-1).repeat(views)
        scale = self.temperature / self.base_temperature
        if self.contrast_mode == "all":
            return scale * supcon_loss(z, ids, temperature=self.temperature, anchors="all")
        rows = _focal_supcon(z, ids, "labels", self.temperature, 0.0, True, True, False, "none")
        return scale * rows[:batch].mean()

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, contrast_mode={self.contrast_mode!r}"
