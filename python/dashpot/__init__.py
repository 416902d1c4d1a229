"""dashpot: fast, exact PyTorch ops for training that is sparse, robust and regularised."""

import importlib.util as _util

# torch comes first: its OpenMP runtime is the one that dashpot._C links.
import torch as _torch  # noqa: F401

from dashpot import aggregate, attacks, contrastive, experts, functional, spectral, transport
from dashpot._backends import backend
from dashpot._dispatch import REGISTRY
from dashpot._explain import explain
from dashpot.functional import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [
    "REGISTRY", "aggregate", "attacks", "backend", "contrastive", "experts", "explain",
    "functional", "spectral", "transport", *functional.__all__,
]  # fmt: skip


def _say_if_uncompiled() -> None:
    if _util.find_spec("dashpot._C") is None:
        import warnings

        warnings.warn(
            "dashpot was installed without its compiled kernels: the PyTorch reference is used "
            "(python -m dashpot info)",
            stacklevel=3,
        )


_say_if_uncompiled()
