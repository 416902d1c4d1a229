"""Arrays of other libraries in, the same kind out: NumPy, CuPy, JAX, anything with `__dlpack__`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import torch


def public(function: Callable) -> Callable:
    """Mark a public function: arrays of other libraries (anything with `__dlpack__`: NumPy, CuPy,
    JAX) become tensors without a copy, and its tensors go back as the caller's kind of array."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):  # the common case costs one check
            return function(*args, **kwargs)
        leaves = _leaves((*args, *kwargs.values()))
        array = next((leaf for leaf in leaves if _is_array(leaf)), None)
        if array is None:
            return function(*args, **kwargs)
        args, kwargs = map_leaves(torch.from_dlpack, _is_array, (args, kwargs))
        return map_leaves(_from_dlpack_of(array), is_tensor, function(*args, **kwargs))

    return call


def is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def _is_array(value) -> bool:
    return hasattr(type(value), "__dlpack__") and not isinstance(value, torch.Tensor)


def _leaves(values) -> Iterator:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value[:1])  # lists hold one kind: their first tells
        else:
            yield value


def map_leaves(function: Callable, test: Callable, value):
    if test(value):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, test, one) for one in value))
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(function, test, one) for one in value)
    if isinstance(value, dict):
        return {key: map_leaves(function, test, one) for key, one in value.items()}
    return value


def _from_dlpack_of(array) -> Callable:
    """`from_dlpack` of the library that the array comes from."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__().from_dlpack
    return sys.modules[type(array).__module__.partition(".")[0]].from_dlpack
