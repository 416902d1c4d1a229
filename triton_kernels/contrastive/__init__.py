"""Triton kernels of the family `contrastive`.

logits    info_nce, info_nce_queue, nt_xent: tiles of pairs.py
koleo     koleo_loss, regularized_info_nce: the same sweep, distances and pulls
groups    focal_supcon_loss, hard_pair_indices, hard_pair_mixup: tiles of tiles.py
margins   tcm_loss, opis: the same tiles
averages  ema_update_
"""

from dashpot.triton_kernels.contrastive.averages import ema_update__forward
from dashpot.triton_kernels.contrastive.groups import (
    focal_supcon_loss_backward,
    focal_supcon_loss_forward,
    focal_supcon_loss_supports,
    hard_pair_indices_forward,
    hard_pair_indices_supports,
    hard_pair_mixup_backward,
    hard_pair_mixup_forward,
)
from dashpot.triton_kernels.contrastive.koleo import (
    koleo_loss_backward,
    koleo_loss_forward,
    regularized_info_nce_forward,
)
from dashpot.triton_kernels.contrastive.logits import (
    info_nce_backward,
    info_nce_forward,
    info_nce_queue_backward,
    info_nce_queue_forward,
    nt_xent_backward,
    nt_xent_forward,
)
from dashpot.triton_kernels.contrastive.margins import (
    opis_forward,
    opis_supports,
    tcm_loss_backward,
    tcm_loss_forward,
    tcm_loss_supports,
)

__all__ = [
    "ema_update__forward",
    "focal_supcon_loss_backward",
    "focal_supcon_loss_forward",
    "focal_supcon_loss_supports",
    "hard_pair_indices_forward",
    "hard_pair_indices_supports",
    "hard_pair_mixup_backward",
    "hard_pair_mixup_forward",
    "info_nce_backward",
    "info_nce_forward",
    "info_nce_queue_backward",
    "info_nce_queue_forward",
    "koleo_loss_backward",
    "koleo_loss_forward",
    "nt_xent_backward",
    "nt_xent_forward",
    "opis_forward",
    "opis_supports",
    "regularized_info_nce_forward",
    "tcm_loss_backward",
    "tcm_loss_forward",
    "tcm_loss_supports",
]
