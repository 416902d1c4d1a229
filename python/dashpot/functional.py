"""Every public op of every family under one roof, as in torch.nn.functional."""

from dashpot import aggregate, contrastive, experts, spectral, transport
from dashpot.aggregate import *  # noqa: F403
from dashpot.contrastive import *  # noqa: F403
from dashpot.experts import *  # noqa: F403
from dashpot.spectral import *  # noqa: F403
from dashpot.transport import *  # noqa: F403

# Without what a family has beside its ops and their Modules: tools that change whole models.
__all__ = [
    name
    for family in (aggregate, contrastive, experts, spectral, transport)
    for name in family.__all__
    if name not in getattr(family, "TOOLS", ())
]
