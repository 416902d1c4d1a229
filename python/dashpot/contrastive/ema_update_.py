"""The op `ema_update_`: moving averages of parameters, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dashpot._dispatch import declare
from dashpot.contrastive._pairs import bytes_of

_WIDE = (torch.float32, torch.float64)


def _ema_update_reference(
    targets: list[Tensor], onlines: list[Tensor], weight: Tensor
) -> list[Tensor]:
    """x + w (y - x) in the dtype of x (...), y (...) of any floating dtype; w () float64. From the
    end that is nearer, as torch.lerp: w = 1 gives y itself."""
    return [
        torch.lerp(x, y.to(x.dtype), weight.to(x.dtype))
        for x, y in zip(targets, onlines, strict=True)
    ]


def _ema_update_fake(targets, onlines, weight):
    return [torch.empty_like(x) for x in targets]


def _ema_update_inputs(size, dtype, device, seed):
    """As many tensors as size[0], of size[1] numbers and one less each; averages in float32 at
    least, new values in the dtype."""
    generator = torch.Generator().manual_seed(seed)
    targets, onlines = [], []
    for s in range(size[0]):
        x, y = (torch.randn(size[1] - s, generator=generator) for _ in range(2))
        targets.append(x.to(device, torch.float64 if dtype == torch.float64 else torch.float32))
        onlines.append(y.to(device, dtype))
    weight = 0.75 if size[1] % 2 else 0.01  # from either end
    return targets, onlines, torch.tensor(weight, dtype=torch.float64, device=device)


def _ema_update_floor(targets, onlines, weight):
    """One read of the new values, one read and one write of the averages."""
    return 2 * bytes_of(*targets) + bytes_of(*onlines), 3 * sum(x.numel() for x in targets)


EMA_UPDATE = declare(
    "ema_update_",
    forward="(Tensor[] targets, Tensor[] onlines, Tensor weight) -> (Tensor[] average)",
    reference=_ema_update_reference,
    fake=_ema_update_fake,
    inputs=_ema_update_inputs,
    floor=_ema_update_floor,
    sizes={
        # one number; below, at and above a vector; an empty one at the end; above a chunk of 64 Ki
        "test": [(1, 1), (2, 8), (3, 17), (6, 5), (4, 34), (2, 70_001)],
        "bench": [(25, 1_000_000), (400, 16_384)],
    },
)


def ema_update_(
    targets: Sequence[Tensor],
    onlines: Sequence[Tensor],
    momentum: float | Tensor = 0.99,
    *,
    step: int | None = None,
    warmup: int | None = None,
) -> None:
    r"""Exponential moving average in place, :math:`\xi \leftarrow \xi + (1 - m)(\theta - \xi)`.

    Averages of 16-bit parameters are kept in float32: in 16 bits a step of 1 percent rounds to
    nothing. One pass, whatever the dtypes: the new values are read once, the averages read and
    written once. (Lists of one dtype go to `torch._foreach_lerp_`, which is as fast.)

    Args:
        targets: tensors (...), the averages; float32 or float64, or integers, which are copied. A
            tensor that comes twice (tied parameters) is updated once.
        onlines: tensors (...), the new values, of the same shapes; any floating dtype.
        momentum: m in [0, 1] (0.99: the preset), or a tensor () or (1,) that the host
            does not read.
        step: with `warmup`, how many updates there have been: m is then at most
            (1 + step) / (warmup + step).
        warmup: see `step`; > 0.

    Returns:
        None.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; a target that
            shares memory with its online tensor is an error.

    No gradient flows.
    """
    pairs = _checked_pairs(targets, onlines)
    weight = _weight(momentum, step, warmup)
    alike, mixed = ([], []), {}  # targets and onlines; the latter by device
    with torch.no_grad():
        for target, online in pairs:
            if not target.is_floating_point():
                target.copy_(online)
                continue
            if target.dtype == online.dtype and not isinstance(weight, Tensor):
                group = alike
            elif target.is_contiguous():
                group = mixed.setdefault(target.device, ([], []))
                online = online.contiguous()
            else:
                target.lerp_(online.to(target.dtype), _on(weight, target.device).to(target.dtype))
                continue
            group[0].append(target)
            group[1].append(online.detach())
        if alike[0]:
            torch._foreach_lerp_(*alike, weight)
        for device, (averages, news) in mixed.items():
            EMA_UPDATE.into(averages, averages, news, _on(weight, device))


def _weight(momentum, step, warmup) -> float | Tensor:
    """What the new values count."""
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"momentum: expected one number, got {tuple(momentum.shape)}")
        weight = 1 - momentum.detach().double().reshape(())
    else:
        if not isinstance(momentum, int | float) or isinstance(momentum, bool):
            raise TypeError(f"momentum: expected a float, got {type(momentum).__name__}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected a number from 0 to 1, got {momentum}")
        weight = 1 - float(momentum)
    if (step is None) != (warmup is None):
        raise ValueError("step: expected together with warmup, got one of them")
    if step is not None:
        if step < 0 or warmup <= 0:
            raise ValueError(f"step: expected step >= 0 and warmup > 0, got {step} and {warmup}")
        early = 1 - (1 + step) / (warmup + step)
        weight = weight.clamp_min(early) if isinstance(weight, Tensor) else max(weight, early)
    return weight


def _on(weight: float | Tensor, device: torch.device) -> Tensor:
    """() float64; a number travels as an argument of the kernel that fills it in."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    return torch.full((), weight, dtype=torch.float64, device=device)


def _checked_pairs(targets, onlines) -> list[tuple[Tensor, Tensor]]:
    for name, tensors in (("targets", targets), ("onlines", onlines)):
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
    if len(targets) != len(onlines):
        raise ValueError(f"onlines: expected {len(targets)} tensors, got {len(onlines)}")
    pairs, seen = [], set()
    for i, (target, online) in enumerate(zip(targets, onlines, strict=True)):
        for name, tensor in (("targets", target), ("onlines", online)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}]: expected a tensor, got {type(tensor).__name__}")
        if target.shape != online.shape or target.device != online.device:
            raise ValueError(
                f"onlines[{i}]: expected {tuple(target.shape)} on {target.device}, "
                f"got {tuple(online.shape)} on {online.device}"
            )
        floating = target.is_floating_point()
        if floating != online.is_floating_point() or (floating and target.dtype not in _WIDE):
            raise TypeError(
                f"targets[{i}]: expected float32, float64 or integers as the online tensor, "
                f"got {target.dtype} for {online.dtype}"
            )
        if hasattr(target, "to_local"):
            target, online = target.to_local(), online.to_local()
        if not torch.compiler.is_compiling() and _shares_memory(target, online):
            raise ValueError(f"targets[{i}]: expected memory of its own, got its online tensor's")
        if id(targets[i]) not in seen:
            seen.add(id(targets[i]))
            pairs.append((target, online))
    return pairs


def _shares_memory(target: Tensor, online: Tensor) -> bool:
    return target.numel() > 0 and target.data_ptr() == online.data_ptr()
