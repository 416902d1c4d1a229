"""Robust aggregation across processes, on PyTorch's own engine (gloo, NCCL): one worker per rank.

    robust_all_reduce(flat, "krum", f=1)                              in a loop of your own
    ddp.register_comm_hook(RobustState("krum", f=1), ddp_hook)        DistributedDataParallel
    robust_fully_shard(model, "krum", f=1)                            FSDP2, after fully_shard

The rows are not collected anywhere. Rank k receives slice k of every worker's row (all-to-all) and
sums the rule's symmetric p x p statistic over that slice; the statistics are added (all-reduce of
p (p+1)/2 float64); every rank solves the same tiny problem and applies the solution to its slice;
the slices are gathered (all-gather; FSDP2 stops before). Bytes that a rank sends, for d numbers of
s bytes:

    all-to-all (p-1)/p ds + statistic (p-1)/p 8 p (p+1) + all-gather (p-1)/p ds

which is what a ring all-reduce sends, 2 (p-1)/p ds, and 1.8 KB at p = 15 beside it. Every number of
the update is computed on one rank and copied to the others: all ranks hold the same bits.

Each rank must call with the same rule and options. Work that is under way is finished in the order
in which it was begun, on every rank, as all collectives of a group must be.

Shapes: p workers = ranks of the group, d numbers per worker, w of them in this rank's slice.
"""

# No `from __future__ import annotations`: DDP compares a hook's annotations with the types.

import dataclasses
import re
import zlib
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from dashpot.aggregate import RobustAggregator
from dashpot.aggregate._rows import as_rows, check_choice, check_tensor
from dashpot.aggregate._rules import Rule, make_rule
from dashpot.aggregate.bucketing import Bucketing

__all__ = [
    "RobustReduceScatter", "RobustState", "RobustWork", "ddp_hook", "robust_all_reduce",
    "robust_fully_shard",
]  # fmt: skip

# torch 2.13 renamed it; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _made(rule: str | Rule | RobustAggregator, options: dict, centered: bool = False) -> Rule:
    """The rule, of which every rank must come to the same solution."""
    if isinstance(rule, str):
        made = make_rule(rule, **options)
    elif isinstance(rule, Rule | RobustAggregator) and not options:
        made = rule.rule if isinstance(rule, RobustAggregator) else rule
    else:
        raise TypeError(
            "rule: expected a name with options, or a RobustAggregator without, "
            f"got {type(rule).__name__} and {options}"
        )
    for i, stage in enumerate(made.pre):
        if isinstance(stage, Bucketing) and stage.generator is None:
            raise ValueError(
                f"pre[{i}]: expected a generator, seeded alike on every rank, got {stage}"
            )
    if not centered and getattr(made, "center", None) is not None:
        raise ValueError("center: expected None where the engine cuts the gradient, got a centre")
    return made


class _Slices:
    """One contiguous flat tensor (d,) of every worker; this rank's slice of each is `rows`.

    `rule` is the rule for that slice: a centre (d,) is cut as the rows are."""

    def __init__(self, flat: Tensor, rule: Rule, center: Tensor | None, group):
        p, rank = dist.get_world_size(group), dist.get_rank(group)
        self.flat, self.group, self.p = flat, group, p
        self.width = -(-flat.numel() // p)  # of every slice but the last ones
        widths = [min(self.width, max(0, flat.numel() - k * self.width)) for k in range(p)]
        self.rows = flat.new_empty((p, widths[rank]))  # (p, w)
        self.rule = rule
        if center is not None:
            self.rule = dataclasses.replace(rule, center=center.split(widths)[rank])
        self.work = dist.all_to_all_single(
            self.rows.view(-1), flat, [widths[rank]] * p, widths, group=group, async_op=True
        )

    def arrive(self) -> None:
        """Once: later calls find nothing to wait for."""
        if self.work is not None:
            self.work.wait()
            self.work = None

    def gather(self, update: Tensor, out: Tensor) -> None:
        """Begin to bring all slices (w,) of the update together in `out` (d,)."""
        self.out, self.rows = out, None
        whole = out.numel() == self.p * self.width
        if update.numel() < self.width:
            update = torch.cat((update, update.new_zeros(self.width - update.numel())))
        self.gathered = out if whole else out.new_empty(self.p * self.width)
        self.work = _all_gather(self.gathered, update, group=self.group, async_op=True)

    def complete(self) -> None:
        self.arrive()
        if self.gathered is not self.out:
            self.out.copy_(self.gathered[: self.out.numel()])


class _Round:
    """Flat tensors that are aggregated with one solution: their statistics add up."""

    def __init__(self, rule: Rule, group: dist.ProcessGroup | None):
        self.rule, self.group = rule, group
        self.sent: list[_Slices] = []
        self.measured = 0
        self.statistic: Tensor | None = None  # (p, p) float64

    def send(self, flat: Tensor, center: Tensor | None = None) -> None:
        self.sent.append(_Slices(flat, self.rule, center, self.group))

    def measure(self, count: int) -> None:
        """Wait for the first `count` tensors and add their statistics."""
        for slices in self.sent[self.measured : count]:
            slices.arrive()
            part = slices.rule.measure(as_rows(slices.rows))
            if part is not None:
                self.statistic = part if self.statistic is None else self.statistic + part
        self.measured = count

    def updates(self) -> list[Tensor]:
        """This rank's slice (w,) of each update."""
        self.measure(len(self.sent))
        if self.statistic is not None:
            _add_over_ranks(self.statistic, self.group)
        solution = self.rule.solve(self.statistic, dist.get_world_size(self.group))
        return [s.rule.apply(s.rows, as_rows(s.rows), solution) for s in self.sent]

    def gather(self, outs: Sequence[Tensor]) -> None:
        for slices, update, out in zip(self.sent, self.updates(), outs, strict=True):
            slices.gather(update, out)

    def complete(self) -> None:
        for slices in self.sent:
            slices.complete()


def _add_over_ranks(statistic: Tensor, group) -> None:
    """All-reduce symmetric matrices (..., q, q) in place, by their upper triangles. The engine adds
    different entries in different orders: two halves would differ in the last bit, and a rule that
    breaks ties (of two rows that are each other's nearest) would no longer see one."""
    i, j = torch.triu_indices(*statistic.shape[-2:], device=statistic.device)
    upper = statistic[..., i, j]  # (..., q (q + 1) / 2)
    dist.all_reduce(upper, group=group)
    statistic[..., i, j] = upper
    statistic[..., j, i] = upper


# --------------------------------------------------------------------------------------------
# In a loop of your own


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    parts = [tensor.reshape(-1) for tensor in tensors]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def _center(rule: Rule, tensors: Sequence[Tensor], is_list: bool) -> list[Tensor] | None:
    """The rule's centre, one tensor for each of `tensors`, where it has one."""
    center = getattr(rule, "center", None)
    if center is None:
        return None
    parts = center if is_list else [center]
    want, got = ([(tuple(t.shape), t.dtype) for t in some] for some in (tensors, parts))
    if got != want:
        raise ValueError(f"center: expected the shapes and dtypes of flat, {want}, got {got}")
    return list(parts)


class RobustWork:
    """An aggregation under way, from ``robust_all_reduce(..., async_op=True)``."""

    def __init__(self, tensors: Sequence[Tensor], rule: Rule, group, is_list: bool):
        self._tensors, self._is_list, self._result = tensors, is_list, None
        self._round = _Round(rule, group)
        center = _center(rule, tensors, is_list)
        self._groups: dict[torch.dtype, list[int]] = {}
        for i, tensor in enumerate(tensors):
            self._groups.setdefault(tensor.dtype, []).append(i)
        self._flats = []
        for members in self._groups.values():
            flat = _flat([tensors[i] for i in members])
            self._flats.append(flat)
            self._round.send(flat, _flat([center[i] for i in members]) if center else None)

    def wait(self) -> Tensor | list[Tensor]:
        """Finish, on every rank in the order of the calls that began; the update."""
        if self._result is None:
            with torch.no_grad():
                outs = [torch.empty_like(flat) for flat in self._flats]
                self._round.gather(outs)
                self._round.complete()
            self._result = [None] * len(self._tensors)
            for out, members in zip(outs, self._groups.values(), strict=True):
                sizes = [self._tensors[i].numel() for i in members]
                for i, part in zip(members, out.split(sizes), strict=True):
                    self._result[i] = part.view(self._tensors[i].shape)
            self._round = self._flats = None
        return self._result if self._is_list else self._result[0]


@torch.no_grad()
def robust_all_reduce(
    flat: Tensor | Sequence[Tensor],
    rule: str | RobustAggregator = "flag",
    group: dist.ProcessGroup | None = None,
    *,
    async_op: bool = False,
    check: bool = True,
    **options,
) -> Tensor | list[Tensor] | RobustWork:
    r"""Aggregate every rank's row with a robust rule; every rank receives the update.

    Args:
        flat: this worker's row, a tensor (...) or a list of S tensors (...): float64, float32,
            bfloat16, float16, lists also mixed; the same shapes on every rank. Not written to.
        rule: the rule's name as in `robust_aggregate`, or a `RobustAggregator`; the same on
            every rank.
        group: the process group; None: the default one. Its ranks are the p workers.
        async_op: return a `RobustWork` at once, with the all-to-all under way; its ``wait()`` does
            the rest. Several may be under way; they are waited for in the order they began, and
            what was given must not be written to before.
        check: compare shapes, dtypes and rule with the other ranks first: one all-gather of one
            integer, read by the host. Without it, ranks that differ hang or mix their numbers up.
        options: of the rule, as in `robust_aggregate`.

    Returns:
        The update (...), a new tensor, or a list of S; bit by bit the same on every rank. In
        float64 equal to `robust_aggregate` on the stacked rows up to the order of summation.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; where ranks
            differ, on every rank.
        RuntimeError: of the engine, if a rank is gone.

    No gradient flows.
    """
    is_list = not isinstance(flat, Tensor)
    if is_list and not (isinstance(flat, list | tuple) and flat):
        raise TypeError(
            f"flat: expected a tensor or a list of at least one, got {type(flat).__name__}"
        )
    tensors = list(flat) if is_list else [flat]
    for i, tensor in enumerate(tensors):
        check_tensor(tensor, f"flat[{i}]" if is_list else "flat")
    made = _made(rule, options, centered=True)
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected one that this rank belongs to")
    if check:
        _check_alike(tensors, made, group)
    work = RobustWork(tensors, made, group, is_list)
    return work if async_op else work.wait()


def _check_alike(tensors: Sequence[Tensor], rule: Rule, group) -> None:
    """Every rank sees every rank's fingerprint, so all of them raise or none does."""
    shown = re.sub(r" at 0x\w+", "", repr(rule))  # a generator's address says nothing
    mine = "; ".join([shown, *(f"{tuple(t.shape)} {t.dtype}" for t in tensors)])
    device = tensors[0].device
    code = torch.tensor([zlib.crc32(mine.encode())], device=device)
    codes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    _all_gather(codes, code, group=group)
    if len(set(codes.tolist())) > 1:
        all_of_them: list = [None] * len(codes)
        dist.all_gather_object(all_of_them, mine, group=group)
        listed = ", ".join(f"rank {rank}: {one}" for rank, one in enumerate(all_of_them))
        raise ValueError(f"flat: expected the same rule, shapes and dtypes on every rank, {listed}")


# --------------------------------------------------------------------------------------------
# DistributedDataParallel


class RobustState:
    """What `ddp_hook` keeps between the buckets of one backward pass. One per model.

    Args:
        rule: the rule's name as in `robust_aggregate`, or a `RobustAggregator`; the same on
            every rank.
        group: the model's process group; None: the default one.
        scope: "global": one solution for the whole gradient; the buckets' statistics are added and
            every bucket waits for the last. "bucket": a solution for each bucket by itself, and
            nothing is kept longer than until the next bucket; a Byzantine worker may be seen in one
            bucket and not in another.
        options: of the rule.

    Both scopes send a bucket's rows while the backward pass goes on, and finish the buckets in
    order, so that all ranks call the engine in the same order. "global" keeps the rows' slices, as
    many numbers as the gradient has, until the last bucket.
    """

    def __init__(
        self,
        rule: str | RobustAggregator = "flag",
        group: dist.ProcessGroup | None = None,
        *,
        scope: Literal["global", "bucket"] = "global",
        **options,
    ):
        check_choice("scope", scope, ("global", "bucket"))
        self.rule = _made(rule, options)
        self.group, self.scope = group, scope
        self._begin()

    def _begin(self) -> None:
        self._rounds: list[_Round] = []
        self._waiting: list[tuple[Tensor, Future]] = []

    def _take(self, bucket: dist.GradBucket) -> Future[Tensor]:
        if bucket.index() == 0:
            self._begin()  # what an interrupted backward pass left is dropped
        elif bucket.index() != len(self._waiting):
            raise RuntimeError(
                f"state: expected bucket {len(self._waiting)}, got {bucket.index()}: "
                "one RobustState serves one model"
            )
        buffer = bucket.buffer()  # (d,)
        future = Future(devices=[buffer.device] if buffer.is_cuda else [])
        self._waiting.append((buffer, future))
        if self.scope == "bucket" or not self._rounds:
            self._rounds.append(_Round(self.rule, self.group))
        self._rounds[-1].send(buffer)
        # While this bucket travels: the one before it.
        if self.scope == "global":
            self._rounds[0].measure(len(self._waiting) - 1)
        elif len(self._rounds) > 1:
            self._rounds[-2].gather([self._waiting[-2][0]])
        if bucket.is_last():
            self._finish()
        return future

    def _finish(self) -> None:
        rounds, waiting = self._rounds, self._waiting
        self._begin()
        buffers = [buffer for buffer, _ in waiting]
        rounds[-1].gather(buffers if self.scope == "global" else buffers[-1:])
        for one in rounds:
            one.complete()
        for buffer, future in waiting:
            future.set_result(buffer)


@torch.no_grad()
def ddp_hook(state: RobustState, bucket: dist.GradBucket) -> Future[Tensor]:
    r"""Communication hook of DistributedDataParallel: the robust update in place of the mean.

        model = DistributedDataParallel(model)
        model.register_comm_hook(RobustState("geometric_median"), ddp_hook)

    With "global" scope the update is that of `robust_aggregate` on the workers' whole gradients,
    however DDP cuts its buckets. `no_sync` accumulates first and aggregates the sums; a parameter
    that a rank does not use counts as zeros there (find_unused_parameters); NaN and inf go to the
    rule, which drops such workers or not. Nothing is divided by the number of workers afterwards.

    Args:
        state: a `RobustState`, one per model.
        bucket: what DDP passes, a slice (d,) of the gradient.

    Returns:
        A future of the bucket's buffer (d,), which then holds the update.

    Raises:
        RuntimeError: one state serves two models, or a rank is gone.
    """
    return state._take(bucket)


# --------------------------------------------------------------------------------------------
# FSDP2


class RobustReduceScatter:
    """A rule in place of FSDP2's reduce-scatter: has the two methods that torch's interface
    `ReduceScatter` asks for (torch keeps that class in a private module, so it is not inherited).

    `robust_fully_shard` installs it. The rows are those of one parameter group, that is of one
    module given to `fully_shard`: each group is aggregated by itself. With
    `FSDPModule.set_custom_reduce_scatter` alone it serves float32 and bfloat16 reductions, where
    FSDP asks for an average; for others FSDP scales the rows before and the sum after, which most
    rules do not commute with, and it raises.
    """

    def __init__(self, rule: str | RobustAggregator = "flag", **options):
        self.rule = _made(rule, options)
        self._unscaled = False  # robust_fully_shard has switched FSDP's own scaling off

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op,
        async_op: bool = False,
    ) -> None:
        """input (d,): slice k is for rank k; output (w,): this rank's slice of the update."""
        if op != dist.ReduceOp.AVG and not (self._unscaled and op == dist.ReduceOp.SUM):
            raise RuntimeError(
                f"op: expected AVG, or SUM after robust_fully_shard(model, rule), got {op}"
            )
        if async_op:
            raise ValueError("async_op: expected False, got True")
        round_ = _Round(self.rule, group)
        round_.send(input_tensor)
        output_tensor.copy_(round_.updates()[0])


def robust_fully_shard(
    module: nn.Module, rule: str | RobustAggregator = "flag", **options
) -> nn.Module:
    r"""Let FSDP2 aggregate gradients with a robust rule, after `fully_shard`.

        fully_shard(model)
        robust_fully_shard(model, "krum", f=1)

    Every FSDP module in `module` gets a `RobustReduceScatter`, and FSDP's division by the number of
    workers is switched off. Each parameter group is aggregated by itself; the workers are the ranks
    that parameters are sharded over.

    Args:
        module: a module that `fully_shard` was applied to, or that holds such modules.
        rule: the rule's name as in `robust_aggregate`, or a `RobustAggregator`; the same on
            every rank.
        options: of the rule.

    Returns:
        module.

    Raises:
        ValueError: no FSDP module in it, or parameters replicated as well as sharded (HSDP), where
            FSDP would average the replicas' updates.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded = [one for one in module.modules() if isinstance(one, FSDPModule)]
    if not sharded:
        raise ValueError("module: expected fully_shard to be applied first, got no FSDPModule")
    for name, parameter in module.named_parameters():
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if any(one.is_replicate() for one in placements):
            raise ValueError(
                f"module: expected parameters that are sharded only, got {name}: {placements}"
            )
    comm = RobustReduceScatter(rule, **options)
    comm._unscaled = True
    for one in sharded:
        one.set_custom_reduce_scatter(comm)
        one.set_gradient_divide_factor(1.0)
        one.set_force_sum_reduction_for_comms(True)
    return module
