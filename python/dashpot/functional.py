"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot import aggregate, transport
from dashpot.aggregate import *  # noqa: F403
from dashpot.transport import *  # noqa: F403

__all__ = [*aggregate.__all__, *transport.__all__]
