"""What the family's ops share: checks of a pair of signals, slopes, inputs for tests."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dashpot.aggregate._rows import check_tensor


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a loss is computed in: float32 for 16-bit inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    return x.to(work_dtype(x.dtype))


def check_pair(input, target) -> tuple[Tensor, Tensor]:
    """Both as contiguous tensors of one dtype (the wider of the two)."""
    check_tensor(input, "input")
    check_tensor(target, "target")
    if target.device != input.device:
        raise ValueError(f"target: expected a tensor on {input.device}, got {target.device}")
    if input.dtype != target.dtype:
        dtype = torch.promote_types(input.dtype, target.dtype)
        input, target = input.to(dtype), target.to(dtype)
    return input.contiguous(), target.contiguous()


def check_same_shape(input: Tensor, target: Tensor) -> None:
    if input.shape != target.shape:
        raise ValueError(f"target: expected {tuple(input.shape)}, got {tuple(target.shape)}")


def check_constant(value, name: str, like: Tensor) -> Tensor:
    """A tensor that no gradient flows to, in the dtype of the computation."""
    check_tensor(value, name)
    if value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without requires_grad: no gradient flows to it"
        )
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {value.device}")
    return value.to(work_dtype(like.dtype)).contiguous()


def check_number(value, name: str, least: float, strict: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not (value > least if strict else value >= least) or not -math.inf < value < math.inf:
        sign = ">" if strict else ">="
        raise ValueError(f"{name}: expected a finite number {sign} {least:g}, got {value}")
    return float(value)


def check_length(value, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value}")
    return value


def wants(*tensors: Tensor) -> list[bool]:
    """Which of them get a gradient: the forward forms no other slope."""
    return [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]


def with_slopes(
    loss: Callable, signals: tuple[Tensor, ...], wanted: list[bool]
) -> tuple[list[Tensor], list[Tensor]]:
    """([outputs], [slopes]) of a reference: loss(*signals) -> outputs, and for each signal that
    wants one the derivative of the first output's sum, else an empty tensor. Where autograd records
    the reference itself, nobody reads the slopes."""
    empty = [wide(signal.new_zeros(0)) for signal in signals]
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not any(wanted):
        return loss(*signals), empty
    places = tuple(i for i, want in enumerate(wanted) if want)

    def total(*signals):
        outs = loss(*signals)
        return outs[0].sum(), outs

    # torch.func: within a registered op, where autograd is switched off, it still differentiates.
    found, outs = torch.func.grad(total, argnums=places, has_aux=True)(*map(wide, signals))
    slopes = dict(zip(places, found, strict=True))
    return outs, [slopes.get(i, empty[i]) for i in range(len(signals))]


def needed_slopes(
    reference: Callable, args: tuple, slopes: tuple[Tensor, Tensor], needs_grad: list[bool]
) -> tuple[Tensor, Tensor]:
    """The slopes of input and target; one that is needed though the forward was not asked for it
    (`wants`, the last of args) is formed now."""
    missing = [needs_grad[i] and slopes[i].numel() == 0 and args[i].numel() > 0 for i in (0, 1)]
    if True not in missing:
        return slopes
    formed = reference(*args[:-1], missing)[1:]
    return tuple(new if m else old for m, new, old in zip(missing, formed, slopes, strict=True))


def random_signals(shape, dtype, device, seed) -> tuple[Tensor, Tensor]:
    """Two noisy signals that share a part, as a generated and a real one do."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return tuple(
        (common + 0.7 * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype)
        for _ in range(2)
    )


def transform_flops(n: int) -> int:
    """Of one real transform."""
    return int(2.5 * n * math.log2(max(n, 2)))
