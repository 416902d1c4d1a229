"""`StochasticExperts`: a feed-forward block of E networks with random routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from dashpot.aggregate._rows import check_choice
from dashpot.experts._plan import DispatchPlan, check_bool, check_int
from dashpot.experts._stack import ExpertStack
from dashpot.experts.random_plan import random_plan
from dashpot.experts.route_balanced import route_balanced
from dashpot.experts.route_random import route_random

Level = Literal["token", "sequence", "batch"]
LEVELS = ("token", "sequence", "batch")
INFERENCE = ("random", "average", "fixed")
PASSES = 2  # of the consistency loss


class StochasticExperts(ExpertStack):
    r"""Experts chosen at random: each token, sequence or batch goes through one of E networks.

    In training a unit's expert is drawn anew at each call. In evaluation `inference` says what is
    computed: "random" draws as in training; "average" is the mean of all experts' outputs (E times
    the work; the mean of the *weights* would be another function); "fixed" is one expert, a plain
    feed-forward block.

    **Routes** are ``route_random(units, E, seed=self.seed, offset=...)``: a pure function of the
    buffer `seed` (0-d int64, drawn when the layer is made, so that layers differ) and of `offset`.
    The layer itself writes no state, so that a call may be repeated:

    - By default `offset` is drawn at each call from torch's generator of the device, as dropout
      draws: ``torch.manual_seed`` makes it reproducible, activation checkpointing restores that
      generator and finds the same routes, captured CUDA graphs advance it at each replay, and each
      rank of a distributed run has its own.
    - With ``offset=0`` (any int) the layer keeps a counter, the buffer `offset`, which it reads and
      `advance` adds to: the same routes on every device, eager or compiled, kept by the state dict.
      Advance it once a step, after the backward. DistributedDataParallel copies buffers from rank
      0; start each rank at ``rank << 32`` and pass ``broadcast_buffers=False`` for unequal routes.
    - ``forward(x, offset=...)`` takes it from the caller.

    **Two passes** for the consistency loss (see `two_pass_loss`) are two calls, or one call on a
    doubled batch. Two calls draw independently. With ``distinct_passes=True`` no unit meets the
    same expert twice, so both passes must know the same offset: pass it, or let the layer keep a
    counter (``pass_id`` 0 and 1), or double the batch (``num_passes=2``).

    The published code draws one expert for a whole batch in training: level "batch". Its inference
    at "sequence" level in fact routes by *position*, the same expert for all sequences at one
    position, as its mask runs over the time axis; ``seq_ids=`` the positions reproduces that. Its
    masks run every expert on every token; here a token costs one expert.

    Shape: x (..., d) -> (..., d). No host synchronisation.

    Args:
        d: features.
        hidden: h, hidden units of an expert.
        E: number of experts.
        level: what is routed as one: each "token", each "sequence" (an index along `batch_dim`, or
            of `seq_ids`), or the whole "batch".
        inference: "random", "average" or "fixed".
        balanced: counts of units per expert differ by at most one (`route_balanced`, then a random
            rotation of the experts, without which few units would never reach some of them).
        distinct_passes: pass 1 avoids the expert of pass 0; E >= 2.
        num_passes: in training x holds this many passes (1 or 2) one after the other along
            `batch_dim`.
        batch_dim: the axis of x that counts sequences: 0 for (B, S, d), 1 for (S, B, d).
        fixed_expert: the expert of inference "fixed".
        offset: where the layer's own counter starts; None: none.
        activation: "relu" (the published model's), "gelu", "gelu_tanh", "silu", "tanh", "identity"
            or a function.
        gated: W2 (act(G x + g) * (U x + u)) + b2 with G and U one after the other in w1.
        bias: whether there are b1 and b2.
        dropout: on the hidden units, in training.
        device, dtype: of the parameters.

    Source: Taming Sparsely Activated Transformer with Stochastic Experts, arXiv 2110.04260.
    """

    def __init__(self, d: int, hidden: int, E: int, level: Level = "token",
                 inference: Literal["random", "average", "fixed"] = "random",
                 balanced: bool = False, distinct_passes: bool = False, *, num_passes: int = 1,
                 batch_dim: int = 0, fixed_expert: int = 0, offset: int | None = None,
                 activation: str | Callable = "relu", gated: bool = False, bias: bool = True,
                 dropout: float = 0.0, device=None, dtype=None):  # fmt: skip
        super().__init__(d, hidden, E, activation=activation, gated=gated, bias=bias,
                         dropout=dropout, device=device, dtype=dtype)  # fmt: skip
        check_choice("level", level, LEVELS)
        check_choice("inference", inference, INFERENCE)
        check_bool("balanced", balanced)
        check_bool("distinct_passes", distinct_passes)
        check_int("num_passes", num_passes, 1, PASSES)
        check_int("batch_dim", batch_dim, 0)
        check_int("fixed_expert", fixed_expert, 0, E - 1)
        if balanced and level == "batch":
            raise ValueError('balanced: expected level "token" or "sequence", got "batch"')
        if distinct_passes and E < PASSES:
            raise ValueError(f"distinct_passes: expected E >= {PASSES} experts, got {E}")
        self.level, self.inference, self.balanced = level, inference, balanced
        self.distinct_passes, self.num_passes = distinct_passes, num_passes
        self.batch_dim, self.fixed_expert = batch_dim, fixed_expert
        self.register_buffer("seed", torch.empty((), dtype=torch.int64, device=device))
        counter = None
        if offset is not None:
            check_int("offset", offset, -(2**63), 2**63 - 1)
            counter = torch.full((), offset, dtype=torch.int64, device=device)
        self.register_buffer("offset", counter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights as torch.nn.Linear's, and a new seed."""
        super().reset_parameters()
        self.seed.copy_(torch.randint(2**62, ()))

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, level={self.level}, inference={self.inference}"
        for name in ("balanced", "distinct_passes"):
            text += f", {name}=True" if getattr(self, name) else ""
        return text + (f", num_passes={self.num_passes}" if self.num_passes > 1 else "")

    def forward(
        self,
        x: Tensor,
        *,
        pass_id: int = 0,
        seq_ids: Tensor | None = None,
        num_seqs: int | None = None,
        offset: int | Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x: (..., d).
            pass_id: 0 or 1; pass p uses ``offset + p``, or choice p with distinct passes.
            seq_ids: integers of shape (...), the sequence of each token, for level "sequence";
                0 <= seq_ids < num_seqs, which is not checked on a GPU.
            num_seqs: how many there are; default: the number of tokens. Balanced routes need it.
            offset: int or 0-d int64 tensor on the device of x; default: the layer's counter, or
                else a draw from torch's generator.

        Returns:
            (..., d), in the dtype of x (autocast's, under it).
        """
        self.check_input(x)
        flat = x.reshape(-1, self.d)  # (T, d)
        if not self.training and self.inference == "average":
            ids = torch.arange(self.E, dtype=torch.int32, device=x.device)
            ids = ids.expand(flat.shape[0], self.E)
            weights = flat.new_full((1, 1), 1 / self.E).expand(ids.shape)
            return self.dispatch(flat, ids, weights).reshape(x.shape)
        if not self.training and self.inference == "fixed":
            ids = flat.new_full((flat.shape[0], 1), self.fixed_expert, dtype=torch.int32)
        elif seq_ids is None and self._plans_directly():
            ids = self._plan(x, pass_id, offset)
        else:
            ids = self.routes(x, pass_id=pass_id, seq_ids=seq_ids, num_seqs=num_seqs, offset=offset)
        return self.dispatch(flat, ids).reshape(x.shape)

    # ---- routes

    def _plans_directly(self) -> bool:
        """Whether `random_plan` knows these routes: one draw a token, tokens in their own order."""
        return (
            self.level == "token"
            and not (self.balanced or self.distinct_passes)
            and self.exchange is None  # which wants ids
            and (self._passes() == 1 or self.batch_dim == 0)
        )

    def _plan(self, x: Tensor, pass_id: int, offset: int | Tensor | None) -> DispatchPlan:
        """The plan of `routes`, which are not stored."""
        passes = self._passes()
        offset = self._offset(x, pass_id, offset)
        if passes > 1:
            self._check_batch_axis(x, passes)
        return random_plan(
            math.prod(x.shape[:-1]) // passes, self.E, num_passes=passes, seed=self.seed,
            offset=offset + pass_id, device=x.device,
        )  # fmt: skip

    def _passes(self) -> int:
        return self.num_passes if self.training else 1

    def _offset(self, x: Tensor, pass_id: int, offset: int | Tensor | None) -> int | Tensor:
        """The one given, or the counter, or a draw."""
        check_int("pass_id", pass_id, 0, PASSES - self._passes())
        if offset is None:
            offset = self.offset
        if offset is None:
            if self.distinct_passes and pass_id:
                raise ValueError(
                    "pass_id: distinct passes share an offset; expected offset=, a layer made with "
                    f"a counter (offset=0), or a doubled batch (num_passes=2), got {pass_id} alone"
                )
            offset = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        return offset

    def routes(
        self,
        x: Tensor,
        *,
        pass_id: int = 0,
        seq_ids: Tensor | None = None,
        num_seqs: int | None = None,
        offset: int | Tensor | None = None,
    ) -> Tensor:
        """The expert of each token, (T, 1) int32, that `forward` takes with these arguments."""
        passes = self._passes()
        offset = self._offset(x, pass_id, offset)
        # A grid with the passes first, (P, ..., B / P, ...), on which the units' experts spread.
        shape, axis = tuple(x.shape[:-1]), self.batch_dim
        if passes == 1 and self.level != "sequence":
            shape, axis = (math.prod(shape),), 0
        elif seq_ids is None or passes > 1:
            self._check_batch_axis(x, passes)
        if seq_ids is not None:
            self._check_seq_ids(x, seq_ids, num_seqs)
            axis = axis if passes > 1 else 0
        each = shape[axis] // passes
        grid = (passes, *shape[:axis], each, *shape[axis + 1 :])
        if seq_ids is not None:
            count = math.prod(shape) if num_seqs is None else num_seqs
            ids = seq_ids.reshape(*shape[:axis], passes, each, *shape[axis + 1 :])
            ids = ids.movedim(axis, 0).reshape(passes, -1).long()  # (P, T / P)
            experts = self._draw(count, pass_id, passes, offset, x.device).gather(1, ids)
            experts = experts.view(grid)
        else:
            units = {
                "token": grid,
                "sequence": (passes, *[1] * axis, each, *[1] * (len(shape) - axis - 1)),
                "batch": (passes, *[1] * len(shape)),
            }[self.level]
            experts = self._draw(math.prod(units[1:]), pass_id, passes, offset, x.device)
            experts = experts.view(units).expand(grid)
        return experts.movedim(0, axis).reshape(-1, 1)

    def _draw(self, units: int, pass_id: int, passes: int, offset, device) -> Tensor:
        """(P, U) int32: the experts of each unit in the passes from pass_id on."""

        def random(count: int) -> Tensor:
            if self.distinct_passes:
                both = route_random(count, self.E, top_k=PASSES, offset=offset, **state)
                return both.T[pass_id : pass_id + passes]
            ids = route_random(count, self.E, num_passes=passes, offset=offset + pass_id, **state)
            return ids.view(passes, count)

        state = {"seed": self.seed, "device": device}
        if not self.balanced:
            return random(units)
        offsets = [offset] if self.distinct_passes else range(passes)
        if not self.distinct_passes:
            offsets = [offset + pass_id + p for p in offsets]
        parts = torch.stack([route_balanced(units, self.E, offset=one, **state) for one in offsets])
        return (parts + random(1)) % self.E

    def _check_batch_axis(self, x: Tensor, passes: int) -> None:
        axis = self.batch_dim
        if x.dim() < axis + 2 or (self.level == "sequence" and x.dim() < 3):
            raise ValueError(
                f"x: expected axis {axis} to count sequences, as (B, S, {self.d}) for batch_dim 0, "
                f"or seq_ids, got {tuple(x.shape)}"
            )
        if x.shape[axis] % passes:
            raise ValueError(
                f"x: expected {passes} passes of one length along axis {axis}, got {tuple(x.shape)}"
            )

    def _check_seq_ids(self, x: Tensor, seq_ids, num_seqs) -> None:
        if self.level != "sequence":
            raise ValueError(f'seq_ids: expected None for level "{self.level}", got a value')
        if not isinstance(seq_ids, Tensor):
            raise TypeError(f"seq_ids: expected a torch.Tensor, got {type(seq_ids).__name__}")
        if seq_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"seq_ids: expected int32 or int64, got {seq_ids.dtype}")
        if seq_ids.shape != x.shape[:-1] or seq_ids.device != x.device:
            raise ValueError(
                f"seq_ids: expected {tuple(x.shape[:-1])} on {x.device}, "
                f"got {tuple(seq_ids.shape)} on {seq_ids.device}"
            )
        if num_seqs is not None:
            check_int("num_seqs", num_seqs, 0)
        elif self.balanced:
            raise ValueError("num_seqs: expected how many sequences there are, to balance them")

    # ---- weights of the published code

    def load_thor_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copy the published model's experts: keys fc1.{i}.weight (h, d), fc1.{i}.bias (h,),
        fc2.{i}.weight (d, h), fc2.{i}.bias (d,) for i < E, behind `prefix`.

        Raises:
            ValueError: keys missing or left over (more experts than E), or another shape.
        """
        if self.exchange is not None:
            raise ValueError(
                "load_thor_state_dict: expected all experts here, call shard_experts after"
            )
        if self.gated or self.b1 is None:
            raise ValueError("load_thor_state_dict: expected a layer with biases and no gate")
        wanted = {
            f"{prefix}{name}.{i}.{part}": target[i]
            for name, targets in (("fc1", (self.w1, self.b1)), ("fc2", (self.w2, self.b2)))
            for part, target in zip(("weight", "bias"), targets, strict=True)
            for i in range(self.E)
        }
        given = {key for key in state if key.startswith((f"{prefix}fc1.", f"{prefix}fc2."))}
        if given != set(wanted):
            raise ValueError(
                f"state: expected the keys of {self.E} experts behind {prefix!r}; "
                f"missing: {sorted(set(wanted) - given)}, left over: {sorted(given - set(wanted))}"
            )
        for key, target in wanted.items():
            if state[key].shape != target.shape:
                raise ValueError(
                    f"state[{key!r}]: expected {tuple(target.shape)}, got {tuple(state[key].shape)}"
                )
        with torch.no_grad():
            for key, target in wanted.items():
                target.copy_(state[key])
