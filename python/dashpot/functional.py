"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot.aggregate import *  # noqa: F403
