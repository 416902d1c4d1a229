"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot import aggregate, contrastive, experts, spectral
from dashpot.aggregate import *  # noqa: F403
from dashpot.contrastive import *  # noqa: F403
from dashpot.experts import *  # noqa: F403
from dashpot.spectral import *  # noqa: F403

__all__ = [*aggregate.__all__, *contrastive.__all__, *experts.__all__, *spectral.__all__]
