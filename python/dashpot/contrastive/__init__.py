"""Contrastive losses: tiles of a similarity matrix that is never stored (family `contrastive`).

Rows are normalised once; a sweep over pairs of blocks forms a tile of cosines, takes what it needs
from it (a sum of exponentials per row, the nearest neighbours) and forgets it. The backward sweep
forms the tile again, turns it into weights, and multiplies by the rows of the other side.

Shapes: B queries, N keys, D coordinates.
"""

from dashpot.contrastive.info_nce import INFO_NCE, info_nce, ring_info_nce
from dashpot.contrastive.info_nce_queue import INFO_NCE_QUEUE, info_nce_queue
from dashpot.contrastive.koleo_loss import KOLEO_LOSS, koleo_loss
from dashpot.contrastive.modules import ClipLoss, InfoNCE, KoLeo, NTXent, RegularizedInfoNCE
from dashpot.contrastive.momentum import EMA, ParticipantPairSampler, ema_update_
from dashpot.contrastive.nt_xent import NT_XENT, nt_xent
from dashpot.contrastive.regularized_info_nce import REGULARIZED_INFO_NCE, regularized_info_nce

__all__ = [
    "EMA",
    "ClipLoss",
    "InfoNCE",
    "KoLeo",
    "NTXent",
    "ParticipantPairSampler",
    "RegularizedInfoNCE",
    "ema_update_",
    "info_nce",
    "info_nce_queue",
    "koleo_loss",
    "nt_xent",
    "regularized_info_nce",
    "ring_info_nce",
]

OPS = (INFO_NCE, INFO_NCE_QUEUE, NT_XENT, KOLEO_LOSS, REGULARIZED_INFO_NCE)
