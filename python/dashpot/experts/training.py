"""What a training step needs beside the layers: the two passes, counters, the routers' losses."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dashpot.experts.consistency_loss import consistency_loss
from dashpot.experts.learned import TopKExperts
from dashpot.experts.stochastic import PASSES, StochasticExperts


class TwoPasses(NamedTuple):
    """loss: of `consistency_loss`. logits1, logits2: (B, ...) of each pass."""

    loss: Tensor
    logits1: Tensor
    logits2: Tensor


def two_pass_loss(
    model: nn.Module,
    inputs: Tensor | tuple | dict[str, Any],
    target: Tensor,
    *,
    batch_dim: int = 0,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> TwoPasses:
    r"""Both passes of the consistency loss as one call on a doubled batch.

    Larger products and half the launches of two calls. In a model with experts at level "batch" or
    with distinct passes the layers must know of the doubling: ``num_passes=2``.

    Args:
        model: returns logits (B, ..., V), or an object with them as `logits`, as Hugging Face's.
        inputs: what it is called with: a tensor, a tuple, or a dictionary of keyword arguments;
            every tensor (B, ...) in them is doubled along `batch_dim`.
        target: (B, ...) int64 classes, as the logits without V.
        batch_dim: the axis of inputs and logits that counts examples.
        alpha, label_smoothing, ignore_index, reduction: as in `consistency_loss`.

    Returns:
        `TwoPasses` (loss, logits1, logits2).

    Raises:
        ValueError: a layer that is training was not made for two passes.
        TypeError: the model returns neither logits nor an object that holds them.
    """
    for name, layer in model.named_modules():
        if (
            isinstance(layer, StochasticExperts)
            and layer.training
            and (layer.level == "batch" or layer.distinct_passes)
            and layer.num_passes != PASSES
        ):
            raise ValueError(f"model: expected {name or 'it'} with num_passes=2 for two passes")

    def double(value):
        return torch.cat([value, value], batch_dim) if isinstance(value, Tensor) else value

    doubled = tree_map(double, inputs)
    if isinstance(doubled, dict):
        logits = model(**doubled)
    else:
        logits = model(*doubled) if isinstance(doubled, tuple) else model(doubled)
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: expected it to return logits, got {type(logits).__name__}")
    first, second = logits.chunk(PASSES, batch_dim)
    loss = consistency_loss(
        first, second, target, alpha=alpha, label_smoothing=label_smoothing,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip
    return TwoPasses(loss, first, second)


def advance(model: nn.Module, by: int = PASSES) -> None:
    """Add `by` to the counter of every `StochasticExperts` in the model, in place on its device.

    Once a step, after the backward (a layer that is recomputed must find the offset it had).

    Args:
        model: any module that holds such layers.
        by: how far; 2, so that the passes of two steps never share an offset.

    Returns:
        None; the counters are changed in place.

    Raises:
        ValueError: a layer has no counter (made without ``offset=``), or there is no such layer.
    """
    layers = [m for m in model.modules() if isinstance(m, StochasticExperts)]
    if not layers or any(layer.offset is None for layer in layers):
        raise ValueError(
            "model: expected StochasticExperts made with a counter (offset=0), got "
            + ("one without" if layers else "none")
        )
    for layer in layers:
        layer.offset.add_(by)


def auxiliary_loss(model: nn.Module) -> Tensor:
    """The sum of `aux_loss` over the layers of a model, taken from them: once per training call.

    Args:
        model: any module that holds `TopKExperts`.

    Returns:
        0-d float32, with the gradient of the routers.

    Raises:
        ValueError: the model has no such layer.
        RuntimeError: a layer was not called in training since the last time, or was called without
            gradients (re-entrant checkpointing).
    """
    layers = [m for m in model.modules() if isinstance(m, TopKExperts)]
    if not layers:
        raise ValueError("model: expected a module that holds TopKExperts, got none")
    losses = []
    for layer in layers:
        loss, layer.aux_loss = layer.aux_loss, None
        if loss is None:
            raise RuntimeError("auxiliary_loss: a layer was not called in training mode before")
        if torch.is_grad_enabled() and layer.router.weight.requires_grad and not loss.requires_grad:
            raise RuntimeError(
                "auxiliary_loss: the router was run without gradients; "
                "activation checkpointing needs use_reentrant=False"
            )
        losses.append(loss)
    return sum(losses[1:], losses[0])
