"""Imports the libraries that dashpot is compared with, as requirements-peers.txt installs them.

    median = peers.load("byzfl").Median

Several import torchvision, data loaders or plot libraries at the top for functions that no
comparison needs. Those modules are stood in for, where they are not installed, by empty ones, for
the length of that import alone. Nothing of a peer is changed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

from dashpot._measure import Peer

# What peers import for their data sets, models and plots.
ABSENT = (
    "ftfy", "huggingface_hub", "hydra", "lightning", "lightly_utils", "omegaconf",
    "pytorch_lightning", "regex", "safetensors", "seaborn", "timm", "torchmetrics", "torchvision",
)  # fmt: skip

# What peers can do without, and what would ask for those, find them, and remember the answer.
HIDDEN = "transformers"


class _Anything(type):
    """A class any name of which is again one of these; called, it gives an object without content,
    and it can be inherited from."""

    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *_, **__: None})


class _Empty(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {"__init__": lambda self, *_, **__: None})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ABSENT:
            return None
        parent = sys.modules.get(name.rpartition(".")[0])
        if parent is not None and not isinstance(parent, _Empty):
            return None  # an installed package that looks for something it may not have
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def has(name: str) -> bool:
    """Whether a peer is installed; on a GPU machine without network it may not be."""
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def installed(named: dict[str, Peer]) -> dict[str, Peer]:
    """Those whose library is there."""
    return {name: one for name, one in named.items() if one.needs is None or has(one.needs)}


def on_a_gpu(size, dtype, device, options) -> bool:
    """A peer's `when`."""
    return device == "cuda"


def load(name: str) -> types.ModuleType:
    """The peer's module `name`, as in `import name`."""
    if name in sys.modules:
        return sys.modules[name]
    finder = _Finder()
    hidden = {key: m for key, m in sys.modules.items() if key.partition(".")[0] == HIDDEN}
    for key in hidden:
        del sys.modules[key]
    sys.modules[HIDDEN] = None  # an ImportError
    sys.meta_path.append(finder)  # last: what is installed is found before
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        del sys.modules[HIDDEN]
        sys.modules.update(hidden)
        for one in [one for one, module in sys.modules.items() if isinstance(module, _Empty)]:
            del sys.modules[one]
