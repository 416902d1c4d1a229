"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot import aggregate, experts
from dashpot.aggregate import *  # noqa: F403
from dashpot.experts import *  # noqa: F403

__all__ = [*aggregate.__all__, *(n for n in experts.__all__ if n not in experts.TOOLS)]
