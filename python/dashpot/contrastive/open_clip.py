"""The loss under open_clip's name, with its arguments: one import to swap.

from dashpot.contrastive.open_clip import ClipLoss
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dashpot.contrastive.info_nce import info_nce

__all__ = ["ClipLoss"]


class ClipLoss(nn.Module):
    """Symmetric InfoNCE of normalised features with the factor of the logits.

    Over several processes (world_size > 1) the loss is that of the local rows and gradients reach
    the keys of the others: open_clip's local_loss with gather_with_grad. Its other two forms have
    the same gradient or a wrong one, and are errors here. cache_labels has nothing to cache.
    """

    def __init__(self, local_loss: bool = False, gather_with_grad: bool = False,
                 cache_labels: bool = False, rank: int = 0, world_size: int = 1,
                 use_horovod: bool = False):  # fmt: skip
        super().__init__()
        if use_horovod:
            raise ValueError(f"use_horovod: expected False, got {use_horovod!r}")
        if world_size > 1 and not (local_loss and gather_with_grad):
            raise ValueError(
                "local_loss and gather_with_grad: expected True where world_size > 1, "
                f"got {local_loss!r} and {gather_with_grad!r}"
            )
        self.rank, self.world_size = rank, world_size

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
                logit_bias: Tensor | float | None = None,
                output_dict: bool = False) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """image_features, text_features (B, D) -> loss (); a bias of all logits changes nothing."""
        loss = info_nce(
            image_features, text_features, logit_scale=torch.as_tensor(logit_scale),
            symmetric=True, normalize=False,
            group=dist.group.WORLD if self.world_size > 1 else None,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss
