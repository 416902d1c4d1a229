"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot import aggregate, spectral
from dashpot.aggregate import *  # noqa: F403
from dashpot.spectral import *  # noqa: F403

__all__ = [*aggregate.__all__, *spectral.__all__]
