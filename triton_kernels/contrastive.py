"""Triton kernels of the family `contrastive`; those on grouped rows are in files of their own.

_contrastive_groups    focal_supcon_loss, hard_pair_indices, hard_pair_mixup
_contrastive_margins   tcm_loss, opis
"""

from dashpot.triton_kernels._contrastive_groups import (  # noqa: F401
    focal_supcon_loss_backward,
    focal_supcon_loss_forward,
    focal_supcon_loss_supports,
    hard_pair_indices_forward,
    hard_pair_indices_supports,
    hard_pair_mixup_backward,
    hard_pair_mixup_forward,
)
from dashpot.triton_kernels._contrastive_margins import (  # noqa: F401
    opis_forward,
    opis_supports,
    tcm_loss_backward,
    tcm_loss_forward,
    tcm_loss_supports,
)
