"""`TopKExperts`, `SwitchExperts`: feed-forward blocks of E networks with learned routes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashpot.aggregate._rows import check_choice
from dashpot.experts._plan import check_bool, check_int
from dashpot.experts._stack import ExpertStack
from dashpot.experts.load_balancing_loss import load_balancing_loss
from dashpot.experts.router_z_loss import router_z_loss
from dashpot.experts.topk_gate import topk_gate


class TopKExperts(ExpertStack):
    r"""Experts chosen by a learned router: each token goes to k of E networks (the baseline).

    p = softmax(R x) in float32; the k largest, y = sum_j p_j expert_j(x). `SwitchExperts` is k = 1.

    **Losses.** After a training call `aux_loss` holds balance_weight * load_balancing_loss +
    z_weight * router_z_loss (a 0-d float32 with gradient): `auxiliary_loss` takes it from every
    layer of a model, to be added to the task's loss. Activation checkpointing must be the one
    without re-entry (``use_reentrant=False``); the other cuts the loss off from the router, which
    `auxiliary_loss` refuses.

    Shape: x (..., d) -> (..., d). No host synchronisation: the capacity follows from shapes.

    Args:
        d: features.
        hidden: h, hidden units of an expert.
        E: number of experts.
        k: experts per token, 1 <= k <= E.
        capacity_factor: an expert keeps at most ceil(factor * k * T / E) choices, the others count
            as 0 (the residual connection carries the token); None: all are kept.
        priority: who is kept, see `dispatch_plan`: "choice", "token" or "score".
        normalize: whether the k weights are divided by their sum.
        balance_weight: of the load-balancing loss; 1e-2 is Switch's.
        z_weight: of the router z-loss; 1e-3 is what its users call reasonable.
        activation, gated, bias, dropout, device, dtype: as in `StochasticExperts`.
    """

    def __init__(self, d: int, hidden: int, E: int, k: int = 2, *,
                 capacity_factor: float | None = None,
                 priority: Literal["choice", "token", "score"] = "choice",
                 normalize: bool = False, balance_weight: float = 1e-2, z_weight: float = 1e-3,
                 activation: str | Callable = "relu", gated: bool = False, bias: bool = True,
                 dropout: float = 0.0, device=None, dtype=None):  # fmt: skip
        super().__init__(d, hidden, E, activation=activation, gated=gated, bias=bias,
                         dropout=dropout, device=device, dtype=dtype)  # fmt: skip
        check_int("k", k, 1, E)
        check_choice("priority", priority, ("choice", "token", "score"))
        check_bool("normalize", normalize)
        if capacity_factor is not None and not 0 <= capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor: expected a number >= 0 or None, got {capacity_factor}"
            )
        self.k, self.capacity_factor, self.priority = k, capacity_factor, priority
        self.normalize, self.balance_weight, self.z_weight = normalize, balance_weight, z_weight
        self.router = nn.Linear(d, E, bias=False, device=device, dtype=dtype)
        self.aux_loss: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.router.reset_parameters()

    def __getstate__(self) -> dict:
        """Copies and pickles hold no loss: it is a part of a graph."""
        return {**super().__getstate__(), "aux_loss": None}

    def extra_repr(self) -> str:
        factor = self.capacity_factor
        return f"{super().extra_repr()}, k={self.k}" + (
            "" if factor is None else f", capacity_factor={factor}"
        )

    def capacity(self, tokens: int) -> int | None:
        """Rows that an expert keeps of this many tokens."""
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * self.k * tokens / self.E)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        self.check_input(x)
        flat = x.reshape(-1, self.d)  # (T, d)
        logits = self._logits(flat)  # (T, E)
        ids, weights = topk_gate(logits, self.k, normalize=self.normalize)
        if self.training:
            self.aux_loss = self.balance_weight * load_balancing_loss(logits, ids)
            self.aux_loss = self.aux_loss + self.z_weight * router_z_loss(logits)
        y = self.dispatch(
            flat, ids, weights, capacity=self.capacity(flat.shape[0]), priority=self.priority
        )
        return y.reshape(x.shape)

    def _logits(self, flat: Tensor) -> Tensor:
        """In float32 at least, under autocast too: a rounded logit changes the route."""
        dtype = torch.promote_types(flat.dtype, torch.float32)
        with torch.autocast(flat.device.type, enabled=False):
            return F.linear(flat.to(dtype), self.router.weight.to(dtype))


class SwitchExperts(TopKExperts):
    """`TopKExperts` with one expert per token, as in Switch Transformers (arXiv 2101.03961).

    Args: as there, without k; capacity_factor 1.25.
    """

    def __init__(self, d: int, hidden: int, E: int, *, capacity_factor: float | None = 1.25,
                 **options):  # fmt: skip
        super().__init__(d, hidden, E, 1, capacity_factor=capacity_factor, **options)
