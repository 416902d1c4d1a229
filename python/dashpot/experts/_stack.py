"""What every layer of experts is made of: E two-layer networks in stacked weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashpot.experts._plan import DispatchPlan, check_int
from dashpot.experts.dispatch_plan import dispatch_plan
from dashpot.experts.expert_mlp import ACTIVATIONS as FUSED
from dashpot.experts.expert_mlp import expert_mlp
from dashpot.experts.grouped_linear import grouped_linear
from dashpot.experts.permute import permute
from dashpot.experts.unpermute import unpermute

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class ExpertStack(nn.Module):
    """E networks y = W2 act(W1 x + b1) + b2, or W2 (act(G x + g) * (U x + u)) + b2 if gated.

    w1 (E, h, d), b1 (E, h), w2 (E, d, h), b2 (E, d); gated: w1 (E, 2h, d) holds the h rows of G,
    then those of U, and b1 (E, 2h) likewise. Without bias b1 and b2 are None.

    The gradient of an expert that no token went to is zero, not None: Adam's moments decay and
    weight decay acts on it all the same, and DistributedDataParallel finds no unused parameter.
    """

    def __init__(self, d: int, hidden: int, E: int, *, activation: str | Callable = "relu",
                 gated: bool = False, bias: bool = True, dropout: float = 0.0, device=None,
                 dtype=None):  # fmt: skip
        super().__init__()
        for name, value in (("d", d), ("hidden", hidden), ("E", E)):
            check_int(name, value, 1)
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)} or a function, "
                f"got {activation!r}"
            )
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(
                f"activation: expected a name or a function, got {type(activation).__name__}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected 0 <= dropout < 1, got {dropout}")
        self.d, self.hidden, self.E = d, hidden, E
        self.activation, self.gated, self.dropout = activation, gated, dropout
        rows = 2 * hidden if gated else hidden
        made = {"device": device, "dtype": dtype}
        self.w1 = nn.Parameter(torch.empty(E, rows, d, **made))
        self.b1 = nn.Parameter(torch.empty(E, rows, **made)) if bias else None
        self.w2 = nn.Parameter(torch.empty(E, d, hidden, **made))
        self.b2 = nn.Parameter(torch.empty(E, d, **made)) if bias else None
        self.converted = None  # set by convert: what these experts stand for
        self.exchange = None  # set by shard_experts: how tokens reach experts of other ranks

    def reset_parameters(self) -> None:
        """Each expert as torch.nn.Linear starts: uniform within 1/sqrt(fan in)."""
        for weight, bias in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def extra_repr(self) -> str:
        name = self.activation if isinstance(self.activation, str) else repr(self.activation)
        text = f"{self.d}, {self.hidden}, E={self.E}, activation={name}"
        for word, value, usual in (("gated", self.gated, False), ("dropout", self.dropout, 0.0),
                                   ("bias", self.b1 is not None, True)):  # fmt: skip
            text += "" if value == usual else f", {word}={value}"
        return text

    # ---- the computation

    def check_input(self, x) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.d:
            raise ValueError(f"x: expected (..., {self.d}), got {tuple(x.shape)}")

    def dispatch(self, x: Tensor, expert_idx: Tensor | DispatchPlan,
                 weights: Tensor | None = None, *, capacity: int | None = None,
                 priority: str = "choice") -> Tensor:  # fmt: skip
        """Every token through its experts: x (T, d), expert_idx (T, k), weights (T, k) -> (T, d).

        A plan in place of ids is for experts that are all here (no capacity). Under autocast
        products are in its dtype, as torch.nn.Linear's are."""
        x = x.to(self._product_dtype(x))
        if self.exchange is not None:
            return self.exchange(self, x, expert_idx, weights, capacity, priority)
        return self.local(x, expert_idx, weights, capacity=capacity, priority=priority)

    def _product_dtype(self, x: Tensor) -> torch.dtype:
        device = x.device.type
        if (
            x.dtype != torch.float64
            and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)
        ):
            return torch.get_autocast_dtype(device)
        if x.dtype != self.w1.dtype:
            raise TypeError(
                f"x: expected {self.w1.dtype} as the weights (or autocast), got {x.dtype}"
            )
        return x.dtype

    def local(self, x: Tensor, expert_idx: Tensor | DispatchPlan, weights: Tensor | None = None,
              *, capacity: int | None = None, priority: str = "choice") -> Tensor:  # fmt: skip
        """`dispatch` among the experts whose weights are here, in the dtype of x."""
        w1, b1, w2, b2 = (
            None if p is None else p.to(x.dtype) for p in (self.w1, self.b1, self.w2, self.b2)
        )
        plan = expert_idx
        if not isinstance(plan, DispatchPlan):
            scores = weights if priority == "score" else None
            plan = dispatch_plan(
                expert_idx, w1.shape[0], capacity=capacity, priority=priority, scores=scores
            )
        dropping = self.training and self.dropout > 0
        if self.activation in FUSED and not dropping:
            return expert_mlp(
                x, plan, w1, b1, w2, b2, weights=weights, activation=self.activation,
                gated=self.gated,
            )  # fmt: skip
        h = self._activate(grouped_linear(permute(x, plan), w1, b1, plan.offsets))  # (R, h)
        if dropping:
            h = F.dropout(h, self.dropout)
        return unpermute(grouped_linear(h, w2, b2, plan.offsets), plan, weights)

    def _activate(self, h: Tensor) -> Tensor:
        function = self.activation
        function = ACTIVATIONS[function] if isinstance(function, str) else function
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return function(gate) * up
        return function(h)
