"""`convert` puts experts where a model has feed-forward blocks; `restore` undoes it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from dashpot.experts._blocks import Block, find, matrix_of
from dashpot.experts._plan import check_int
from dashpot.experts._stack import ExpertStack
from dashpot.experts.stochastic import StochasticExperts

Layers = Literal["alternate", "all"] | Iterable[int] | Callable[[int, str, nn.Module], bool]
TAKEN_FROM_BLOCK = ("activation", "gated", "bias", "dropout", "batch_dim", "device", "dtype")


class Converted:
    """What `restore` needs: the block as it was, kept beside the modules of the model, so that
    neither state_dict nor parameters() see it."""

    def __init__(self, first: tuple[nn.Module, ...], second: nn.Module, changed: list):
        self.first, self.second = first, second
        self.changed = changed  # (owner, attribute, what was there)


def convert(
    model: nn.Module,
    E: int = 2,
    *,
    layers: Layers = "alternate",
    experts: type[ExpertStack] = StochasticExperts,
    noise: float = 0.0,
    **options,
) -> dict[str, ExpertStack]:
    r"""Replace feed-forward blocks of a model by E experts, each a copy of the block, in place.

    Blocks are found by structure and checked in numbers: in torch.nn.TransformerEncoderLayer and
    TransformerDecoderLayer (whose fused call in evaluation is turned off, as it would go around the
    experts), in modules such as Llama's (gated), T5's, GPT-2's or an nn.Sequential, and in BERT's
    pairs of modules. The converted model computes at first what it computed before; its activation,
    biases and dropout are the block's.

    Convert before making the optimizer. Weights are shared with nothing; the block as it was is
    kept for `restore`, outside the state dict, which then holds stacked w1, b1, w2, b2.

    Args:
        model: any module. Nothing in it may be compiled yet.
        E: experts per block.
        layers: which blocks, counted from 0 in each stack of layers (encoder, decoder, ...):
            "alternate" is every second from 0 on, as in the published code; "all"; numbers; or a
            function (number, name, module that holds it) -> bool.
        experts: StochasticExperts, TopKExperts or SwitchExperts.
        noise: standard deviation of what is added to each expert's weights, as a share of theirs;
            0 leaves it to the routes to make experts differ.
        options: keyword arguments of `experts`, such as ``level="batch"`` or ``offset=0``.

    Returns:
        {name: experts}, the new layers by the names of the blocks they replaced.

    Raises:
        TypeError: naming an argument and what came.
        ValueError: there is no block, `layers` selects none or one that is not there, an option is
            the block's to say, or a block mixes dtypes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not (isinstance(experts, type) and issubclass(experts, ExpertStack)):
        raise TypeError(f"experts: expected a class of layers of experts, got {experts!r}")
    check_int("E", E, 1)
    if not noise >= 0:
        raise ValueError(f"noise: expected a number >= 0, got {noise}")
    for name in TAKEN_FROM_BLOCK:
        if name in options:
            raise ValueError(f"{name}: expected not to be given, it is taken from the block")
    blocks = find(model)
    if not blocks:
        raise ValueError(
            "model: expected feed-forward blocks (two linear layers with an activation between, or "
            "three if gated), found none"
        )
    chosen = _choose(blocks, layers)
    made = [(block, _experts_of(block, E, experts, noise, options)) for block in chosen]
    for block, layer in made:
        _install(block, layer)
    return {block.name: layer for block, layer in made}


def restore(model: nn.Module, *, expert: int | None = None) -> None:
    """Undo `convert`, in place: the feed-forward blocks stand again where they stood.

    Args:
        model: what `convert` was given, or a copy of it.
        expert: None gives each block the weights it had when it was converted; a number those of
            that expert, as they are now (a dense model of one expert).

    Returns:
        None; the model is changed in place.

    Raises:
        ValueError: nothing in the model was converted, there is no such expert, or the experts
            are split over ranks (`shard_experts`).
    """
    layers = [m for m in model.modules() if isinstance(m, ExpertStack) and m.converted is not None]
    if not layers:
        raise ValueError("model: expected one that `convert` has changed")
    if expert is not None:
        check_int("expert", expert, 0, min(layer.E for layer in layers) - 1)
        if any(layer.exchange is not None for layer in layers):
            raise ValueError("expert: expected a model whose experts are all on this rank")
    for layer in layers:
        converted = layer.converted
        for part in (*converted.first, converted.second):
            part.to(device=layer.w1.device, dtype=layer.w1.dtype).train(layer.training)
        if expert is not None:
            _write(converted, layer, expert)
        for owner, name, before in reversed(converted.changed):
            setattr(owner, name, before)
            if isinstance(before, nn.Module):
                before.train(layer.training)


def _choose(blocks: list[Block], layers: Layers) -> list[Block]:
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        stacks.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", block.name), []).append(block)
    numbered = [(i, block) for stack in stacks.values() for i, block in enumerate(stack)]
    if layers == "all":
        chosen = [block for _, block in numbered]
    elif layers == "alternate":
        chosen = [block for i, block in numbered if i % 2 == 0]
    elif callable(layers):
        chosen = [block for i, block in numbered if layers(i, block.name, block.places[0][0])]
    elif isinstance(layers, str):
        raise ValueError(
            f'layers: expected "alternate", "all", numbers or a function, got {layers!r}'
        )
    else:
        wanted = set(layers)
        there = {i for i, _ in numbered}
        if not wanted <= there:
            raise ValueError(
                f"layers: expected numbers below {len(there)}, got {sorted(wanted - there)}"
            )
        chosen = [block for i, block in numbered if i in wanted]
    if not chosen:
        raise ValueError(f"layers: selects none of the {len(blocks)} blocks")
    return chosen


def _parts(first: tuple[nn.Module, ...], second: nn.Module) -> tuple[Tensor | None, ...]:
    """w1 (h, d) or (2h, d), b1, w2 (d, h), b2 of a block."""
    biases = [linear.bias for linear in first]
    return (
        torch.cat([matrix_of(linear) for linear in first]),
        None if biases[0] is None else torch.cat(biases),
        matrix_of(second),
        second.bias,
    )


def _experts_of(block: Block, E: int, experts: type[ExpertStack], noise: float, options: dict):
    linears = (*block.first, block.second)
    places = {(linear.weight.dtype, linear.weight.device) for linear in linears}
    if len(places) > 1 or len({linear.bias is None for linear in block.first}) > 1:
        raise ValueError(f"{block.name}: expected weights of one dtype and device, got {places}")
    dtype, device = places.pop()
    if issubclass(experts, StochasticExperts):
        options = {**options, "batch_dim": block.batch_dim}
    with torch.no_grad():
        parts = _parts(block.first, block.second)
        d, hidden = parts[2].shape
        layer = experts(
            d, hidden, E, activation=block.activation, gated=len(block.first) == 2,
            dropout=block.dropout, device=device, dtype=dtype, **options,
        )  # fmt: skip
        for name, part, linear in zip(
            ("w1", "b1", "w2", "b2"), parts, (linears[0], linears[0], linears[-1], linears[-1]),
            strict=True,
        ):  # fmt: skip
            if part is None:
                setattr(layer, name, None)
                continue
            target = getattr(layer, name)
            target.copy_(part.expand(E, *part.shape))
            if noise:
                target.add_(torch.randn_like(target) * (noise * part.std(correction=0)))
            target.requires_grad_(linear.weight.requires_grad)
    return layer.train(block.second.training)


def _install(block: Block, layer: ExpertStack) -> None:
    changed = []
    new = layer if block.after is None else nn.Sequential(layer, *block.after)
    new.train(layer.training)
    for owner, name, value in [*((o, n, new) for o, n in block.places), *block.changes]:
        before = getattr(owner, name)
        if before is not value:  # an encoder may have been changed for another layer of it
            changed.append((owner, name, before))
            setattr(owner, name, value)
    layer.converted = Converted(block.first, block.second, changed)


def _write(converted: Converted, layer: ExpertStack, expert: int) -> None:
    """Expert's weights into the block."""
    first, second = converted.first, converted.second
    with torch.no_grad():
        chunks = layer.w1[expert].chunk(len(first))
        for linear, weight in zip((*first, second), (*chunks, layer.w2[expert]), strict=True):
            matrix_of(linear).copy_(weight)
        if layer.b1 is not None:
            for linear, bias in zip(first, layer.b1[expert].chunk(len(first)), strict=True):
                linear.bias.copy_(bias)
        if layer.b2 is not None:
            second.bias.copy_(layer.b2[expert])
