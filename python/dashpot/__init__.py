"""dashpot: fast, exact PyTorch ops for training that is sparse, robust and regularised."""

import importlib.util

import torch as _torch  # first: its OpenMP runtime is the one that dashpot._C links

from dashpot import aggregate, functional
from dashpot._dispatch import REGISTRY, backend, explain
from dashpot.functional import *  # noqa: F403

__version__ = "0.1.0"


def _say_if_uncompiled() -> None:
    if importlib.util.find_spec("dashpot._C") is None:
        import warnings

        warnings.warn(
            "dashpot was installed without its compiled kernels: the PyTorch reference is used "
            "(python -m dashpot info)",
            stacklevel=3,
        )


_say_if_uncompiled()
