"""Expert parallelism: each rank of a process group holds E / W of the experts (`shard_experts`).

Tokens are sorted by expert, which puts those of one rank beside each other, travel to the rank that
holds their expert, are computed there, and come back by the same way: two all-to-alls forward, two
backward. Rank r holds experts r*E/W to (r+1)*E/W - 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dashpot.experts._plan import DispatchPlan, check_int
from dashpot.experts._stack import ExpertStack
from dashpot.experts.dispatch_plan import dispatch_plan
from dashpot.experts.permute import permute
from dashpot.experts.unpermute import unpermute


def shard_experts(
    model: nn.Module,
    group: dist.ProcessGroup | None = None,
    *,
    rows_per_expert: int | None = None,
) -> list[nn.Parameter]:
    r"""Split every layer of experts in a model over the ranks of a group, in place.

    Each rank keeps the weights of its own experts; routers stay whole. Every rank calls the model
    as before, with its own tokens (none at all is allowed), the same layers in the same order, all
    with gradients or all without. Call it on equal weights, before making the optimizer.

    **Host synchronisation.** How many tokens go to each rank is known on the device only, and the
    collective wants it on the host: each call reads it once (2 W numbers), which waits for the
    device and cannot be captured in a CUDA graph. With `rows_per_expert` nothing is read: every
    rank sends that many rows to every expert, padded with zeros, and drops the choices beyond,
    which then count as 0, as with a capacity. The padding travels, but is not computed.

    **Gradients.** Those of an expert's weights are summed over the tokens of all ranks. A loss that
    each rank averages over its own tokens, with DistributedDataParallel averaging the rest over W
    ranks, corresponds to expert gradients divided by W; and DistributedDataParallel must leave the
    parameters returned here alone (``_set_params_and_buffers_to_ignore_for_model``).

    Args:
        model: holds StochasticExperts, TopKExperts or SwitchExperts.
        group: the ranks; None is all. W divides E.
        rows_per_expert: rows that a rank may send to an expert in a call; None sends what there is.

    Returns:
        The parameters that differ from rank to rank from now on.

    Raises:
        ValueError: no layer of experts, one that is split already, or E not a multiple of W.
    """
    layers = [m for m in model.modules() if isinstance(m, ExpertStack)]
    if not layers:
        raise ValueError("model: expected a module that holds layers of experts, got none")
    if rows_per_expert is not None:
        check_int("rows_per_expert", rows_per_expert, 1)
    group = dist.group.WORLD if group is None else group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    for layer in layers:
        if layer.exchange is not None:
            raise ValueError("model: expected layers whose experts are all here, got a split one")
        if layer.E % ranks:
            raise ValueError(f"E: expected a multiple of the {ranks} ranks, got {layer.E}")
    changed = []
    for layer in layers:
        here = slice(rank * layer.E // ranks, (rank + 1) * layer.E // ranks)
        for name in ("w1", "b1", "w2", "b2"):
            parameter = getattr(layer, name)
            if parameter is not None:
                part = nn.Parameter(parameter.detach()[here].clone(), parameter.requires_grad)
                setattr(layer, name, part)
                changed.append(part)
        layer.exchange = Exchange(group, rows_per_expert)
    return changed


class Exchange:
    """Brings tokens to the ranks of their experts and the results back."""

    def __init__(self, group: dist.ProcessGroup, rows_per_expert: int | None):
        from torch.distributed import _functional_collectives  # a build of torch may lack it

        self.collective = _functional_collectives.all_to_all_single_autograd
        self.group, self.rows = group, rows_per_expert
        self.ranks = dist.get_world_size(group)

    def __call__(self, layer: ExpertStack, x: Tensor, expert_idx: Tensor, weights: Tensor | None,
                 capacity: int | None, priority: str) -> Tensor:  # fmt: skip
        if self.rows is not None:
            capacity = self.rows if capacity is None else min(capacity, self.rows)
        scores = weights if priority == "score" else None
        plan = dispatch_plan(
            expert_idx, layer.E, capacity=capacity, priority=priority, scores=scores
        )
        counts = plan.counts.view(self.ranks, -1)  # (W, E/W) rows to each rank's experts
        received = self._all_to_all(counts, None, None)  # (W, E/W) rows from each rank
        if self.rows is None:
            y = self._as_many_as_there_are(layer, x, plan, counts, received)
        else:
            plan = padded(plan, self.rows)
            y = self._padded(layer, permute(x, plan), received)
        return unpermute(y, plan, weights)

    def _as_many_as_there_are(self, layer, x, plan, counts, received) -> Tensor:
        sent, got = torch.stack([counts.sum(1), received.sum(1)]).tolist()  # waits for the device
        local = torch.arange(received.shape[1], dtype=torch.int32, device=x.device)
        ids = local.repeat(self.ranks).repeat_interleave(
            received.flatten(), output_size=sum(got)
        )  # which expert of this rank each row is for
        total = sum(sent)
        rows = permute(x, plan)  # (R, d)
        y = layer.local(self._all_to_all(rows[:total], got, sent), ids)
        y = self._all_to_all(y, sent, got)  # (total, d)
        return F.pad(y, (0, 0, 0, rows.shape[0] - total))  # choices that went nowhere

    def _padded(self, layer, rows: Tensor, received: Tensor) -> Tensor:
        """rows (E * C, d), C to each expert."""
        place = torch.arange(self.rows, dtype=torch.int32, device=rows.device)
        local = torch.arange(received.shape[1], dtype=torch.int32, device=rows.device)
        ids = torch.where(place < received[..., None], local[:, None], -1)  # (W, E/W, C)
        y = layer.local(self._all_to_all(rows, None, None), ids.flatten())
        return self._all_to_all(y, None, None)

    def _all_to_all(self, rows: Tensor, got: list[int] | None, sent: list[int] | None) -> Tensor:
        return self.collective(rows.contiguous(), got, sent, self.group)


def padded(plan: DispatchPlan, rows: int) -> DispatchPlan:
    """The plan with C slots for each expert, whatever it keeps; counts <= C."""
    experts = plan.counts.shape[0]
    start = plan.offsets - plan.counts  # (E,) where an expert's rows begin
    place = torch.arange(rows, device=start.device)  # (C,)
    taken = place < plan.counts[:, None]  # (E, C)
    slot = torch.where(taken, start[:, None] + place, 0)
    order = F.pad(plan.order, (0, 1), value=-1)  # a slot to point to where there are no tokens
    order = torch.where(taken, order[slot], -1).flatten()  # (E * C,)
    # Back: slot r of expert e becomes e * C + r - start[e].
    expert = torch.bucketize(plan.rank, plan.offsets, right=True)  # (T, k)
    moved = (
        plan.rank
        + (torch.arange(experts, device=start.device) * rows - start)[expert.clamp(max=experts - 1)]
    )
    rank = torch.where(plan.rank >= 0, moved, -1)
    ends = (torch.arange(experts, device=start.device) + 1) * rows
    return DispatchPlan(plan.counts, plan.routed, ends.int(), order.int(), rank.int())
