"""`core_tuning_loss`: cross entropy of the mixed batch and the focal contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashpot._arrays import public
from dashpot._dispatch import chain
from dashpot.contrastive._grouped import GROUP_SIZES, rows_of
from dashpot.contrastive._pairs import bytes_of, check_number, check_rows, unit_rows, wide
from dashpot.contrastive.focal_supcon_loss import (
    FOCAL_SUPCON_LOSS,
    _focal_supcon,
    _focal_supcon_loss_floor,
)


@public
def core_tuning_loss(
    logits: Tensor,
    z: Tensor,
    soft: Tensor,
    groups: Tensor,
    *,
    eta: float = 0.1,
    temperature: float = 0.07,
    gamma: float = 1.0,
) -> Tensor:
    r"""Soft-label cross entropy of the mixed batch plus eta times `focal_supcon_loss`.

    .. math:: L = -\frac{1}{N} \sum_{ik} y_{ik} \log \mathrm{softmax}(\mathrm{logits}_i)_k
              + \eta\, L_{\mathrm{focal}}(z, \mathrm{groups})

    Args:
        logits: (N, K) classifier outputs of the mixed rows, N = 3B after `hard_pair_mixup`.
        z: (N, d) contrastive outputs of the same rows, of length 1.
        soft: (N, K) soft labels, rows that sum to 1, in the dtype of `logits`.
        groups: (N,) integers from `hard_pair_mixup`.
        eta: weight of the contrastive term (the official README's command: 0.1).
        temperature, gamma: see `focal_supcon_loss`; positives are normalised by the batch.

    Returns:
        The loss (), float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Unleashing the Power of Contrastive Self-Supervised Visual Models via
    Contrast-Regularized Fine-Tuning, arXiv 2102.06605; defaults of its published code.
    """
    check_rows(logits, "logits")
    check_rows(z, "z")
    if z.shape[0] != logits.shape[0] or z.device != logits.device:
        raise ValueError(
            f"z: expected ({logits.shape[0]}, d) on {logits.device}, "
            f"got {tuple(z.shape)} on {z.device}"
        )
    check_rows(soft, "soft", logits, same_count=True)
    eta = check_number(eta, "eta", strict=False)
    contrast = _focal_supcon(z, groups, "groups", temperature, gamma, False, False, False, "mean")
    entropy = -(wide(soft) * F.log_softmax(wide(logits), dim=1)).sum() / max(logits.shape[0], 1)
    return entropy + eta * contrast


def _core_tuning_loss_inputs(size, dtype, device, seed):
    """Logits of eleven classes, unit rows, soft labels and their groups."""
    z, groups = rows_of(size, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    logits = torch.randn(z.shape[0], 11, generator=generator)
    soft = torch.rand(z.shape[0], 11, generator=generator)
    soft = soft / soft.sum(1, keepdim=True)
    z = unit_rows(z).to(dtype)
    return logits.to(device, dtype), z, soft.to(device, dtype), groups


def _core_tuning_loss_floor(logits, z, soft, groups):
    read, flops = _focal_supcon_loss_floor(z, groups)
    return read + bytes_of(logits, soft), flops + 5 * logits.numel()


CORE_TUNING_LOSS = chain(
    "core_tuning_loss",
    core_tuning_loss,
    (FOCAL_SUPCON_LOSS,),
    inputs=_core_tuning_loss_inputs,
    floor=_core_tuning_loss_floor,
    sizes=GROUP_SIZES,
)


class CoreTuningLoss(nn.Module):
    """`core_tuning_loss` with its options kept."""

    def __init__(self, eta: float = 0.1, temperature: float = 0.07, gamma: float = 1.0):
        super().__init__()
        self.eta = check_number(eta, "eta", strict=False)
        self.temperature = check_number(temperature, "temperature")
        self.gamma = check_number(gamma, "gamma", strict=False)

    def forward(self, logits: Tensor, z: Tensor, soft: Tensor, groups: Tensor) -> Tensor:
        """logits (N, K), z (N, d), soft (N, K), groups (N,) -> loss ()"""
        return core_tuning_loss(logits, z, soft, groups, eta=self.eta,
                                temperature=self.temperature, gamma=self.gamma)  # fmt: skip

    def extra_repr(self) -> str:
        return f"eta={self.eta:g}, temperature={self.temperature:g}, gamma={self.gamma:g}"
