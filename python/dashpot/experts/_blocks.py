"""Finds the feed-forward blocks of a model, by structure and a check in numbers, not by names.

A block is y = W2 act(W1 x + b1) + b2 or W2 (act(G x + g) * (U x + u)) + b2, wherever it lives:

    layer    torch.nn.TransformerEncoderLayer, TransformerDecoderLayer: linear1 and linear2 of the
             layer itself
    module   a module with two or three linear children, an activation and dropouts (Llama, T5,
             GPT-2, nn.Sequential)
    split    two modules beside each other, act(W1 x + b1) and one that starts with W2 (BERT)

Shapes and children propose; then the code itself is run on random numbers with random weights of
the same shapes, in training and in evaluation, and must give what the formula gives. Blocks that
do more, or dropouts that are not modules, therefore do not pass.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashpot.experts._stack import ACTIVATIONS

TOKENS = 4  # of a probe
NO_SUCH_CALL = (TypeError, ValueError, RuntimeError, IndexError)  # code that takes other inputs


@dataclass
class Block:
    """A feed-forward block, and where its parts are held."""

    name: str
    first: tuple[nn.Module, ...]  # (W1,) or (G, U)
    second: nn.Module
    activation: str | Callable
    dropout: float  # on the hidden units
    batch_dim: int  # the axis of its input that counts sequences
    # Whose attribute becomes the experts, followed by `after`; and what else is changed to what.
    places: list[tuple[nn.Module, str]]
    after: nn.Module | None = None
    changes: list[tuple[Any, str, Any]] = field(default_factory=list)


def _is_linear(module: nn.Module) -> bool:
    """torch.nn.Linear, or a module that holds a weight (in, out) and a bias (out,) and no more."""
    if type(module) is nn.Linear:
        return not nn.utils.parametrize.is_parametrized(module)
    own = dict(module.named_parameters())
    return (
        set(own) == {"weight", "bias"}
        and not list(module.children())
        and own["weight"].dim() == 2
        and own["bias"].shape == own["weight"].shape[1:]
    )


def matrix_of(linear: nn.Module) -> Tensor:
    """Its weight as (out, in)."""
    return linear.weight if type(linear) is nn.Linear else linear.weight.T


def _widths(linear: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    rows, columns = matrix_of(linear).shape
    return columns, rows


def find(model: nn.Module) -> list[Block]:
    """The blocks of a model, in the order of its modules."""
    blocks, inside = [], set()
    known: dict[Any, Any] = {}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        block = _layer(name, module) or _module(name, module, model, known) or _split(name, module)
        if block is not None:
            blocks.append(block)
            # What a layer or a pair holds besides (attention) is not searched for more blocks.
            inside |= {id(one) for one in module.modules()}
    _leave_nested_tensors(model, blocks)
    return blocks


# --------------------------------------------------------------------------------------------
# torch.nn's layers


def _identity(x: Tensor) -> Tensor:
    return x


def _layer(name: str, module: nn.Module) -> Block | None:
    if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return None
    if not (_is_linear(module.linear1) and _is_linear(module.linear2)):
        return None  # converted already
    activation = module.activation
    block = Block(
        name, (module.linear1,), module.linear2, name_of(activation), module.dropout.p,
        0 if module.self_attn.batch_first else 1, [(module, "linear1")],
    )  # fmt: skip
    block.changes = [
        (module, "linear2", nn.Identity()),
        (module, "dropout", nn.Identity()),
        (module, "activation", nn.Identity() if isinstance(activation, nn.Module) else _identity),
    ]
    if isinstance(module, nn.TransformerEncoderLayer):
        # In evaluation one fused call would read linear1.weight; without a known activation the
        # layer does not take it.
        block.changes.append((module, "activation_relu_or_gelu", 0))
    return block


def _leave_nested_tensors(model: nn.Module, blocks: list[Block]) -> None:
    """An encoder makes nested tensors of padded batches, for the fused call alone."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            held = {id(layer) for layer in encoder.layers}
            for block in blocks:
                if id(block.places[0][0]) in held:
                    block.changes.append((encoder, "use_nested_tensor", False))


# --------------------------------------------------------------------------------------------
# A module of its own


@dataclass
class _Roles:
    """Which child of a module is what; the same for every module of its kind."""

    first: tuple[str, ...]
    second: str
    activation: str  # of an attribute; "" is none
    inner: tuple[str, ...]  # dropouts on the hidden units
    outer: tuple[str, ...]  # dropouts on the output


def _module(name: str, module: nn.Module, model: nn.Module, known: dict) -> Block | None:
    if not name:
        return None  # nobody holds it
    children = dict(module.named_children())
    kind = (
        type(module),
        tuple((key, type(child), *map(tuple, (p.shape for p in child.parameters())))
              for key, child in children.items()),
    )  # fmt: skip
    if kind not in known:
        known[kind] = _roles(module, children)
    roles = known[kind]
    if roles is None:
        return None
    dropouts = [nn.Dropout(children[key].p) for key in roles.outer if children[key].p > 0]
    keep = 1.0
    for key in roles.inner:
        keep *= 1 - children[key].p
    return Block(
        name, tuple(children[key] for key in roles.first), children[roles.second],
        name_of(getattr(module, roles.activation)) if roles.activation else "identity",
        1 - keep if len(roles.inner) > 1 else sum(children[key].p for key in roles.inner),
        0, _owners(model, module), nn.Sequential(*dropouts) if dropouts else None,
    )  # fmt: skip


def _owners(model: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    """Everyone who holds a module: a shared one is replaced everywhere."""
    return [
        (owner, key) for owner in model.modules() for key, one in owner._modules.items()
        if one is child
    ]  # fmt: skip


def _roles(module: nn.Module, children: dict[str, nn.Module]) -> _Roles | None:
    linears = [key for key, child in children.items() if _is_linear(child)]
    dropouts = [key for key, child in children.items() if isinstance(child, nn.Dropout)]
    others = [key for key in children if key not in linears and key not in dropouts]
    parameters = sum(len(list(children[key].parameters())) for key in linears)
    if (
        len(linears) not in (2, 3)
        or len(list(module.parameters())) != parameters
        or list(module.buffers())
    ):
        return None
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)
                 or inspect.isbuiltin(value)]  # fmt: skip
    for *first, second in itertools.permutations(linears):
        shapes = {_widths(children[key]) for key in first}
        if shapes != {_widths(children[second])[::-1]}:
            continue
        for activation in (*others, *functions, ""):
            roles = _Roles(tuple(first), second, activation, (), ())
            order = _agrees(module, children, roles, dropouts)
            if order is not None:
                called = [key for key in order if key in dropouts]
                at = order.index(second)
                roles.inner = tuple(key for key in called if order.index(key) < at)
                roles.outer = tuple(key for key in called if order.index(key) > at)
                starts = max(order.index(key) for key in (*first, *others) if key in order[:at])
                if all(order.index(key) > starts for key in roles.inner):
                    return roles
    return None


def _agrees(module, children, roles: _Roles, dropouts: list[str]) -> list[str] | None:
    """Whether the module computes the formula in these roles: the children in the order they were
    called, or None."""
    d, _ = _widths(children[roles.first[0]])
    weights = _random_weights(module)
    x = _random(1, TOKENS, d)

    def product(key: str, x: Tensor) -> Tensor:
        weight = weights[f"{key}.weight"]
        weight = weight if type(children[key]) is nn.Linear else weight.T
        return F.linear(x, weight, weights.get(f"{key}.bias"))

    function = getattr(module, roles.activation) if roles.activation else _identity
    order: list[str] = []
    hooks = [
        child.register_forward_hook(lambda *_, key=key: order.append(key))
        for key, child in children.items()
    ]
    try:
        with torch.no_grad(), _quiet(children[key] for key in dropouts):
            hidden = function(product(roles.first[0], x))
            for key in roles.first[1:]:
                hidden = hidden * product(key, x)
            wanted = product(roles.second, hidden)
            for training in (True, False):
                order.clear()
                with _mode(module, training):
                    got = torch.func.functional_call(module, weights, (x,))
                if not _same(got, wanted):
                    return None
    except NO_SUCH_CALL:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return list(order)


# --------------------------------------------------------------------------------------------
# Two modules beside each other


def _split(name: str, module: nn.Module) -> Block | None:
    halves = []
    for key, child in module.named_children():
        linears = [one for one in child.modules() if _is_linear(one)]
        if len(linears) == 1 and linears[0] is not child:
            halves.append((key, child, linears[0]))
    for (key, one, first), (_, two, second) in itertools.permutations(halves, 2):
        if _widths(first) != _widths(second)[::-1]:
            continue
        activation = _starts(one, first)
        place = _ends(two, second) if activation is not None else None
        if place is not None:
            return Block(
                f"{name}.{key}" if name else key, (first,), second, name_of(activation), 0.0, 0,
                [(module, key)], None, [(*place, nn.Identity())],
            )  # fmt: skip
    return None


def _starts(half: nn.Module, linear: nn.Module) -> Callable | None:
    """The activation, if the module is act(W1 x + b1) and no more."""
    if len(list(half.parameters())) != len(list(linear.parameters())) or list(half.buffers()):
        return None
    weights = _random_weights(half)
    x = _random(1, TOKENS, _widths(linear)[0])
    candidates = [child for child in half.children() if not _is_linear(child)]
    candidates += [
        value for value in vars(half).values()
        if inspect.isfunction(value) or inspect.isbuiltin(value)
    ]  # fmt: skip
    with torch.no_grad():
        for function in candidates:
            try:
                with _mode(half, True):
                    got = torch.func.functional_call(half, weights, (x,))
                z = torch.func.functional_call(linear, _random_weights(linear), (x,))
                if _same(got, function(z)):
                    return function
            except NO_SUCH_CALL:
                continue
    return None


def _ends(half: nn.Module, linear: nn.Module) -> tuple[nn.Module, str] | None:
    """Where W2 is held, if the module (hidden, residual) is a function of (W2 hidden + b2,
    residual)."""
    required = [
        p for p in inspect.signature(half.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    if len(required) != 2:
        return None
    hidden_width, d = _widths(linear)
    weights = _random_weights(half)
    hidden, residual = _random(1, TOKENS, hidden_width), _random(1, TOKENS, d, seed=1)
    owner, key = _owners(half, linear)[0]
    prefix = next(name for name, one in half.named_modules() if one is linear)
    rest = {name: w for name, w in weights.items() if not name.startswith(f"{prefix}.")}
    own = {name.removeprefix(f"{prefix}."): w for name, w in weights.items() if name not in rest}
    try:
        with torch.no_grad(), _mode(half, False):
            wanted = torch.func.functional_call(half, weights, (hidden, residual))
            product = torch.func.functional_call(linear, own, (hidden,))
            setattr(owner, key, nn.Identity())
            got = torch.func.functional_call(half, rest, (product, residual))
    except NO_SUCH_CALL:
        return None
    finally:
        setattr(owner, key, linear)
    return (owner, key) if _same(got, wanted) else None


# --------------------------------------------------------------------------------------------
# Probes


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _random_weights(module: nn.Module) -> dict[str, Tensor]:
    """Weights of the same shapes, on the CPU, which keep values near 1; nothing depends on how a
    model was initialised, or whether it has memory at all (device meta)."""
    return {
        name: _random(*p.shape, seed=i + 2) / (max(p.shape) ** 0.5 if p.dim() > 1 else 1)
        for i, (name, p) in enumerate(module.named_parameters())
    }


def _same(got: Any, wanted: Tensor) -> bool:
    return (
        isinstance(got, Tensor)
        and got.shape == wanted.shape
        and bool(wanted.any())
        and torch.allclose(got.float(), wanted, rtol=1e-4, atol=1e-4)
    )


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(one, one.training) for one in module.modules()]
    module.train(training)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for one, was in before:
            one.training = was


@contextlib.contextmanager
def _quiet(dropouts) -> Iterator[None]:
    before = [(one, one.p) for one in dropouts]
    for one, _ in before:
        one.p = 0.0
    try:
        yield
    finally:
        for one, p in before:
            one.p = p


def name_of(function: Callable) -> str | Callable:
    """The name of an activation that the kernels know, found by its values; or the function."""
    grid = torch.linspace(-6, 6, 241, dtype=torch.float64)
    with torch.no_grad():
        values = function(grid.clone())
    for name, known in ACTIVATIONS.items():
        if torch.allclose(values, known(grid), rtol=1e-12, atol=1e-12):
            return name
    return function
