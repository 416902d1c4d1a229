"""`SparseOTRouter`: which tokens go to which experts, by regularised optimal transport."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dashpot.aggregate._rows import check_choice
from dashpot.experts._plan import DispatchPlan, check_experts, check_int
from dashpot.experts.dispatch_plan import dispatch_plan
from dashpot.transport._problem import REGULARIZERS, check_gamma, check_tensor, state_dtype
from dashpot.transport.regularized_ot import SOLVERS, OTResult, regularized_ot

ROUND_TO = 4  # capacities are multiples of this, as in the official code


class Routes(NamedTuple):
    """What a router decides for T tokens, over all groups.

    plan: for `permute`, `expert_mlp`, `unpermute`. weights: (T, k), the gate's probability of each
    choice of ``plan.rank``, with gradient. expert_idx: (T, k) int32, -1 where a choice is not made
    (k = E where experts choose). result: the `OTResult` behind it, one entry per group.
    """

    plan: DispatchPlan
    weights: Tensor
    expert_idx: Tensor
    result: OTResult


class SparseOTRouter(nn.Module):
    r"""Routes tokens to experts by transport with at most k nonzeros per expert, or per token.

    The cost is :math:`-\mathrm{softmax}(logits)`, a token has mass 1, an expert tokens / experts:
    every expert is asked for its share, and the gate decides of whom. The plan says only who goes
    where; what the experts return is weighted by softmax(logits), through which alone the gate
    learns (as in the official code). No host synchronisation but the solver's own.

    Give one of

    * `capacity_factor`: experts choose tokens. Each takes at most
      ceil(factor * tokens / experts) of a group, rounded up to a multiple of 4; a token may be
      taken by several experts or by none (the residual connection carries it).
    * `num_selected`: tokens choose experts, at most so many each.

    Shape: logits (..., T, E), each leading entry a group that is balanced by itself -> `Routes` of
    all tokens, in order.

    Args:
        num_experts: E.
        capacity_factor: see above.
        num_selected: see above, at most E.
        solver: of `regularized_ot`; "adam" is the official one.
        max_iter: its steps; 20.
        lr: Adam's, 1e-2.
        gamma: strength of the regulariser, 1.
        reg: "sparse"; or, for comparison, "l2" and "negentropy" (with solver="sinkhorn" a router
            as S-BASE: on -logits in place of -softmax), whose plans have no bound: the largest
            entries of each expert (token) are taken.

    Source: Sparsity-Constrained Optimal Transport, arXiv 2209.15466 (its mixture-of-experts runs).
    """

    def __init__(self, num_experts: int, *, capacity_factor: float | None = None,
                 num_selected: int | None = None,
                 solver: Literal["auto", "adam", "lbfgs", "newton", "sinkhorn"] = "adam",
                 max_iter: int = 20, lr: float = 1e-2, gamma: float = 1.0,
                 reg: Literal["sparse", "l2", "negentropy"] = "sparse"):  # fmt: skip
        super().__init__()
        check_experts(num_experts)
        if (capacity_factor is None) == (num_selected is None):
            raise ValueError(
                "capacity_factor, num_selected: expected one of them (experts choose, or tokens), "
                f"got {capacity_factor} and {num_selected}"
            )
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: expected a positive number, got {capacity_factor}")
        if num_selected is not None:
            check_int("num_selected", num_selected, 1, num_experts)
        check_choice("solver", solver, SOLVERS)
        check_int("max_iter", max_iter, 1)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr: expected a positive, finite number, got {lr}")
        check_choice("reg", reg, REGULARIZERS)
        self.num_experts, self.capacity_factor = num_experts, capacity_factor
        self.num_selected, self.solver, self.max_iter, self.lr = num_selected, solver, max_iter, lr
        self.gamma, self.reg = check_gamma(gamma), reg

    def extra_repr(self) -> str:
        factor, selected = self.capacity_factor, self.num_selected
        how = f"num_selected={selected}" if factor is None else f"capacity_factor={factor}"
        return f"{self.num_experts}, {how}, reg={self.reg}, solver={self.solver}"

    def capacity(self, tokens: int) -> int:
        """Tokens of a group of this many that an expert takes at most, where experts choose."""
        share = math.ceil(self.capacity_factor * tokens / self.num_experts)
        return min(tokens, math.ceil(share / ROUND_TO) * ROUND_TO)

    def forward(self, logits: Tensor) -> Routes:
        """logits (..., T, E) -> Routes of all tokens."""
        check_tensor(logits, "logits")
        if logits.dim() < 2 or logits.shape[-1] != self.num_experts:
            raise ValueError(
                f"logits: expected (..., T, {self.num_experts}), got {tuple(logits.shape)}"
            )
        if logits.shape[-2] == 0:
            raise ValueError(f"logits: expected at least one token, got {tuple(logits.shape)}")
        groups = logits.reshape(-1, *logits.shape[-2:]).to(state_dtype(logits))  # (G, T, E)
        weights = groups.softmax(-1)  # (G, T, E)
        with torch.no_grad():
            cost = -(groups if self.reg == "negentropy" else weights)
            chosen, result = self._solve(cost)
        if self.num_selected is None:
            plan = _plan_of_experts(chosen, groups.shape[1])
            ids = torch.where(plan.rank < 0, -1, torch.arange(self.num_experts).to(plan.rank))
            return Routes(plan, weights.flatten(0, 1), ids, result)
        ids = chosen.reshape(-1, self.num_selected)  # (G T, k)
        picked = weights.flatten(0, 1).gather(1, ids.clamp(min=0).long())  # (G T, k)
        return Routes(dispatch_plan(ids, self.num_experts), picked, ids, result)

    def _solve(self, cost: Tensor) -> tuple[Tensor, OTResult]:
        """Who is chosen: experts choose (G, C, E) tokens, tokens choose (G, T, k) experts; int32,
        -1 where there is none."""
        tokens, experts = cost.shape[-2:]
        experts_choose = self.num_selected is None
        count = self.capacity(tokens) if experts_choose else self.num_selected
        axis = -2 if experts_choose else -1
        sparse = self.reg == "sparse"
        result = regularized_ot(
            cost, cost.new_ones(cost.shape[:-1]),
            cost.new_full((cost.shape[0], experts), tokens / experts),
            reg=self.reg, gamma=self.gamma, max_nz=count if sparse else None, sparse_dim=axis,
            solver=self.solver, max_iter=self.max_iter, lr=self.lr, tol=0.0,
            plan="topk" if sparse else "dense", differentiable=None,
        )  # fmt: skip
        if sparse:
            return result.plan.indices, result
        mass, chosen = result.plan.topk(count, dim=axis)
        return torch.where(mass > 0, chosen, -1).int(), result


def _plan_of_experts(chosen: Tensor, tokens: int) -> DispatchPlan:
    """The plan of what experts took: chosen (G, C, E) -> an expert's segment holds G C slots, its
    rows in ascending order first. k = E: choice j of a token is expert j."""
    groups, capacity, experts = chosen.shape
    total, room = groups * tokens, groups * capacity
    first = torch.arange(groups, device=chosen.device)[:, None, None] * tokens
    rows = torch.where(chosen < 0, total, chosen + first)  # (G, C, E), total: none
    rows = rows.permute(2, 0, 1).reshape(experts, room).sort(dim=1).values  # (E, G C)
    taken = rows < total
    expert = torch.arange(experts, device=chosen.device)
    order = torch.where(taken, rows * experts + expert[:, None], -1).reshape(-1)  # (E G C,)
    slots = torch.arange(experts * room, device=chosen.device)
    rank = torch.full((total * experts + 1,), -1, device=chosen.device, dtype=slots.dtype)
    rank = rank.scatter(0, torch.where(order < 0, total * experts, order), slots)
    counts = taken.sum(1).int()
    return DispatchPlan(
        counts, counts, ((expert + 1) * room).int(), order.int(),
        rank[:-1].reshape(total, experts).int(),
    )  # fmt: skip
