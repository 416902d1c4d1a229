"""The momentum encoder and its batches: `ema_update_`, `EMA`, `ParticipantPairSampler`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dashpot.contrastive._pairs import INTEGERS

_WIDE = (torch.float32, torch.float64)
_CHUNK = 1 << 16  # numbers that are converted at a time: they stay in the second-level cache


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
    nothing. Tensors of equal dtypes go to `torch._foreach_lerp_`; 16-bit ones are converted a block
    at a time.

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
    with torch.no_grad():
        _update(pairs, weight)


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
        target, online = (getattr(t, "to_local", lambda t=t: t)() for t in (target, online))
        if target.numel() and target.data_ptr() == online.data_ptr():
            raise ValueError(f"targets[{i}]: expected memory of its own, got its online tensor's")
        if id(targets[i]) not in seen:
            seen.add(id(targets[i]))
            pairs.append((target, online))
    return pairs


def _update(pairs: list[tuple[Tensor, Tensor]], weight: float | Tensor) -> None:
    equal = []
    for target, online in pairs:
        if not target.is_floating_point():
            target.copy_(online)
        elif target.dtype == online.dtype and not isinstance(weight, Tensor):
            equal.append((target, online))
        elif isinstance(weight, Tensor):
            target.lerp_(online.to(target.dtype), weight.to(target))
        elif target.is_contiguous() and online.is_contiguous():
            blocks = target.view(-1).split(_CHUNK), online.view(-1).split(_CHUNK)
            for block, new in zip(*blocks, strict=True):
                block.lerp_(new.to(block.dtype), weight)
        else:
            target.lerp_(online.to(target.dtype), weight)
    if equal:
        torch._foreach_lerp_([t for t, _ in equal], [o for _, o in equal], weight)


class EMA(nn.Module):
    """Float32 averages of a module's parameters, and a momentum that may rise by half a cosine.

    `update(module)` averages the parameters (frozen ones too) and copies the buffers. The averages
    are buffers of this module, so its `state_dict` holds them with the number of updates.

    momentum: m_0, of the first update. final: m_1, reached after `steps` updates:
    m_t = m_1 - (m_1 - m_0) (cos(pi t / T) + 1) / 2.
    """

    def __init__(self, module: nn.Module, momentum: float = 0.99, *, final: float | None = None,
                 steps: int | None = None):  # fmt: skip
        super().__init__()
        if (final is None) != (steps is None):
            raise ValueError("final: expected together with steps, got one of them")
        self.momentum, self.final, self.steps = momentum, final, steps
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.names = {}
        for name, tensor in self._tensors(module):
            self.names[name] = f"average_{len(self.names)}"
            wide = tensor.is_floating_point() and tensor.dtype not in _WIDE
            average = tensor.detach().clone()
            self.register_buffer(self.names[name], average.float() if wide else average)
        self._count = 0

    @staticmethod
    def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from module.named_parameters()
        yield from module.named_buffers()

    def momentum_at(self, step: int) -> float:
        if self.final is None:
            return self.momentum
        share = min(step, self.steps) / self.steps
        return self.final - (self.final - self.momentum) * (math.cos(math.pi * share) + 1) / 2

    def update(self, module: nn.Module) -> None:
        parameters = dict(module.named_parameters())
        targets = [getattr(self, self.names[name]) for name in parameters]
        ema_update_(targets, list(parameters.values()), self.momentum_at(self._count))
        for name, buffer in module.named_buffers():
            getattr(self, self.names[name]).copy_(buffer)
        self._count += 1
        self.updates.add_(1)

    def _load_from_state_dict(self, state, prefix, *rest):
        super()._load_from_state_dict(state, prefix, *rest)
        self._count = int(self.updates)

    def copy_to(self, module: nn.Module) -> None:
        """The averages into a module of the same names, in its dtypes."""
        with torch.no_grad():
            for name, tensor in self._tensors(module):
                tensor.copy_(getattr(self, self.names[name]))


class ParticipantPairSampler:
    """Batches of positive pairs: two different segments of one participant each.

    Every epoch permutes the participants that own at least two segments and draws two distinct
    segments of each, uniformly. No batch holds a participant twice. Yields (B, 2) int64 positions
    into `subject_ids`; a batch costs a few operations on B numbers, whatever N is.

    subject_ids: (N,) integers, the participant of each segment. batch_size: B >= 1. drop_last:
    leave out the last batch if it is smaller. generator: on the CPU, for reproducible draws.
    """

    def __init__(self, subject_ids, batch_size: int, *, drop_last: bool = True,
                 generator: torch.Generator | None = None):  # fmt: skip
        ids = torch.as_tensor(subject_ids)
        if ids.dim() != 1 or ids.dtype not in INTEGERS:
            raise ValueError(
                f"subject_ids: expected (N,) integers, got {tuple(ids.shape)} {ids.dtype}"
            )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        self.batch_size, self.drop_last, self.generator = batch_size, drop_last, generator
        ordered, self._segments = torch.sort(ids.cpu(), stable=True)  # segments by participant
        _, counts = torch.unique_consecutive(ordered, return_counts=True)
        begins = counts.cumsum(0) - counts
        self._begins, self._counts = begins[counts >= 2], counts[counts >= 2]
        if self._begins.numel() == 0:
            raise ValueError("subject_ids: expected a participant with two segments, got none")

    def __len__(self) -> int:
        whole, rest = divmod(self._begins.numel(), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(self._begins.numel(), generator=self.generator)
        for chosen in order.split(self.batch_size)[: len(self)]:
            counts = self._counts[chosen]
            share = torch.rand(2, chosen.numel(), generator=self.generator, dtype=torch.float64)
            first = (share[0] * counts).long()
            second = (share[1] * (counts - 1)).long()
            second = second + (second >= first)  # the other ones, in order
            yield self._segments[self._begins[chosen, None] + torch.stack([first, second], 1)]
