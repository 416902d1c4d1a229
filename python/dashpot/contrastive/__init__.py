"""Contrastive losses: tiles of a similarity matrix that is never stored (family `contrastive`).

Rows are normalised once; a sweep over pairs of blocks forms a tile of cosines, takes what it needs
from it (a sum of exponentials per row, the nearest neighbours) and forgets it. The backward sweep
forms the tile again, turns it into weights, and multiplies by the rows of the other side.

Shapes: B queries, N keys, D coordinates.
"""

from dashpot.contrastive.core_tuning_loss import CORE_TUNING_LOSS, CoreTuningLoss, core_tuning_loss
from dashpot.contrastive.ema_update_ import EMA_UPDATE, ema_update_
from dashpot.contrastive.focal_supcon_loss import FOCAL_SUPCON_LOSS, focal_supcon_loss
from dashpot.contrastive.hard_pair_indices import HARD_PAIR_INDICES, hard_pair_indices
from dashpot.contrastive.hard_pair_mixup import HARD_PAIR_MIXUP, hard_pair_mixup
from dashpot.contrastive.info_nce import INFO_NCE, info_nce, ring_info_nce
from dashpot.contrastive.info_nce_queue import INFO_NCE_QUEUE, info_nce_queue
from dashpot.contrastive.koleo_loss import KOLEO_LOSS, koleo_loss, ring_koleo_loss
from dashpot.contrastive.metric_learning import SupConLoss
from dashpot.contrastive.modules import InfoNCE, KoLeo, NTXent, RegularizedInfoNCE
from dashpot.contrastive.momentum import EMA, ParticipantPairSampler
from dashpot.contrastive.nt_xent import NT_XENT, nt_xent, ring_nt_xent
from dashpot.contrastive.open_clip import ClipLoss
from dashpot.contrastive.opis import OPIS, OpisCurves, opis
from dashpot.contrastive.regularized_info_nce import REGULARIZED_INFO_NCE, regularized_info_nce
from dashpot.contrastive.supcon_loss import (
    SUPCON_LOSS,
    MultiViewSupConLoss,
    supcon_loss,
)
from dashpot.contrastive.tcm_loss import TCM_LOSS, TcmStats, ThresholdConsistentMarginLoss, tcm_loss

__all__ = [
    "EMA",
    "ClipLoss",
    "CoreTuningLoss",
    "InfoNCE",
    "KoLeo",
    "MultiViewSupConLoss",
    "NTXent",
    "OpisCurves",
    "ParticipantPairSampler",
    "RegularizedInfoNCE",
    "SupConLoss",
    "TcmStats",
    "ThresholdConsistentMarginLoss",
    "core_tuning_loss",
    "ema_update_",
    "focal_supcon_loss",
    "hard_pair_indices",
    "hard_pair_mixup",
    "info_nce",
    "info_nce_queue",
    "koleo_loss",
    "nt_xent",
    "opis",
    "regularized_info_nce",
    "ring_info_nce",
    "ring_koleo_loss",
    "ring_nt_xent",
    "supcon_loss",
    "tcm_loss",
]  # fmt: skip

OPS = (
    INFO_NCE, NT_XENT, KOLEO_LOSS, REGULARIZED_INFO_NCE, HARD_PAIR_INDICES, HARD_PAIR_MIXUP,
    FOCAL_SUPCON_LOSS, SUPCON_LOSS, CORE_TUNING_LOSS, TCM_LOSS, OPIS, INFO_NCE_QUEUE, EMA_UPDATE,
)  # fmt: skip
