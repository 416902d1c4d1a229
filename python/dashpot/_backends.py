"""Where kernels are found, and which of them a call may use.

A backend is a module that holds functions named `<op>_forward`, `<op>_backward` and
`<op>_supports`; a kernel exists when the function with its name exists.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

# An op of integers alone (routes, plans) has them first.
_DTYPES = frozenset(
    (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
)


@dataclass
class Backend:
    """A module of kernels: where it is found, what its functions' names end in, what it takes."""

    name: str
    module: Callable[[str], ModuleType]  # family -> module; ImportError says why there is none
    devices: tuple[str, ...]
    suffix: str = ""
    dtypes: frozenset[torch.dtype] = _DTYPES


def _compiled(_family: str) -> ModuleType:
    return importlib.import_module("dashpot._C")


def _triton(family: str) -> ModuleType:
    return importlib.import_module(f"dashpot.triton_kernels.{family}")


def _library(family: str) -> ModuleType:
    """Where a family says which of PyTorch's own fused functions compute its ops."""
    name = f"dashpot.{family}._torch"
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"PyTorch has no function for the ops of {family}")
    return importlib.import_module(name)


def _triton_devices() -> tuple[str, ...]:
    """Triton's interpreter (TRITON_INTERPRET=1) runs the kernels on CPU tensors."""
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


BACKENDS = {
    "cpp": Backend("cpp", _compiled, ("cpu",)),
    "triton": Backend("triton", _triton, _triton_devices(), dtypes=_DTYPES - {torch.float64}),
    "cuda": Backend("cuda", _compiled, ("cuda",), suffix="_cuda"),
    "torch": Backend("torch", _library, ("cpu", "cuda")),  # by hand only
}
ORDER = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}  # then the reference, always


@dataclass(slots=True)
class Kernel:
    """One op on one backend."""

    name: str
    forward: Callable
    backward: Callable | None
    supports: Callable | None
    devices: tuple[str, ...]
    dtypes: frozenset[torch.dtype]

    def declines(self, first: torch.Tensor, args: Sequence) -> str | None:
        """Why this kernel cannot take the call, or None. `first`: the call's first tensor."""
        if first.device.type not in self.devices:
            return f"needs a tensor on {' or '.join(self.devices)}, got {first.device.type}"
        if first.dtype not in self.dtypes:
            return f"has no kernel for {first.dtype}"
        return self.supports(*args) if self.supports is not None else None


def _split(names: str | None) -> tuple[str, ...] | None:
    if not names:
        return None
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in BACKENDS and name != "reference":
            known = ", ".join((*BACKENDS, "reference"))
            raise ValueError(f"backend: expected one of {known}, got {name!r}")
    return chosen


_forced: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "dashpot_backend",
    default=_split(os.environ.get("DASHPOT_BACKEND")),  # noqa: B039 (a tuple)
)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Choose the backend by hand: `with dashpot.backend("reference"): ...`.

    name: "cpp", "cuda", "triton", "reference", or "torch" for functions of PyTorch itself, where it
    has one (F.grouped_mm); several, separated by commas, are tried in that order; None gives the
    choice back to the dispatcher. A call that none of them can take raises RuntimeError with each
    one's reason. The environment variable DASHPOT_BACKEND, read once at import, sets the same for
    the whole process.
    """
    token = _forced.set(_split(name))
    try:
        yield
    finally:
        _forced.reset(token)
