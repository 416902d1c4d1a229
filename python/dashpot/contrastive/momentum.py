"""The momentum encoder and its batches: `EMA`, `ParticipantPairSampler`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dashpot.contrastive._pairs import INTEGERS
from dashpot.contrastive.ema_update_ import _WIDE, ema_update_


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
