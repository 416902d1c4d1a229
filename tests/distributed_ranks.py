"""What test_distributed.py runs in real processes, one per rank, over gloo:

    python tests/distributed_ranks.py GROUP FOLDER

GROUP is a key of GROUPS. torch is imported once and the ranks are forked. Each rank runs the
group's checks in order and rank 0 notes the name of each that all ranks have passed in
FOLDER/passed; a check that fails ends all ranks, with its traceback.

Shapes: p ranks, d numbers per worker.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import dashpot
import pytest
import torch
import torch.distributed as dist
from dashpot import NNM, Bucketing, attacks
from dashpot.distributed import (
    RobustReduceScatter,
    RobustState,
    ddp_hook,
    robust_all_reduce,
    robust_fully_shard,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

GROUPS: dict[str, tuple[int, list[Callable]]] = {
    "all_reduce": (7, []), "ddp": (4, []), "fsdp": (4, []), "fsdp_of_two": (2, []), "dead": (3, []),
}  # fmt: skip
DEAD_AFTER = 8  # seconds: what a collective waits for a rank in the group "dead"

# Rules of one Byzantine worker in p, as (name, options); those for which p is large enough.
RULES = {
    "mean": ("mean", {}, 1),
    "flag": ("flag", {"output": "rescaled"}, 1),
    "flag-lam": ("flag", {"lam": 8.0}, 3),
    "geometric_median": ("geometric_median", {}, 1),
    "centered_clipping": ("centered_clipping", {"tau": 1.0, "n_iter": 3}, 1),
    "nnm": ("geometric_median", {"pre": [NNM(1)]}, 3),
    "krum": ("krum", {"f": 1}, 5),
    "multi_krum": ("multi_krum", {"f": 1}, 5),
    "mda": ("mda", {"f": 1}, 3),
    "coordinate_median": ("coordinate_median", {}, 1),
    "trimmed_mean": ("trimmed_mean", {"f": 1}, 3),
    "meamed": ("meamed", {"f": 1}, 3),
    "bulyan": ("bulyan", {"f": 1}, 7),
}


def rules(p: int) -> list[tuple[str, dict]]:
    return [(name, options) for name, options, least in RULES.values() if p >= least]


def check(group: str):
    def enter(function):
        GROUPS[group][1].append(function)
        return function

    return enter


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    """Distance relative to the length; both finite."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = (got.double() - want.double()).norm()
    assert error <= tolerance * want.double().norm(), (
        f"relative error {(error / want.double().norm()).item():.2g} in {tuple(want.shape)}"
    )


def same_on_all_ranks(tensor: Tensor, group=None) -> None:
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor.contiguous(), group=group)
    assert all(torch.equal(row, tensor) for row in rows)


def honest_rows(p: int, d: int, seed: int = 0) -> Tensor:
    """(p, d) float64, the same on every rank: a common direction, as many others as keep a gap in
    the spectrum where `flag` cuts it, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, (p + 1) // 2, generator=generator, dtype=torch.float64)
    mixing[:, 0] = 3
    directions = torch.randn(mixing.shape[1], d, generator=generator, dtype=torch.float64)
    noise = torch.randn(p, d, generator=generator, dtype=torch.float64)
    return mixing @ directions + 0.01 * noise


ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda honest: honest[:1] + 0.1,
    "NaN": lambda honest: attacks.constant(honest, 1, value=float("nan")),
    "inf": lambda honest: attacks.constant(honest, 1, value=float("inf")),
    "sign flip": lambda honest: attacks.sign_flip(honest, 1),
    "scaled": lambda honest: attacks.reverse(honest, 1, scale=100.0),
    "ALIE": lambda honest: attacks.alie(honest, 1, deviations=-1.5),
}
FINITE = [name for name in ATTACKS if name not in ("NaN", "inf")]


def attacked(p: int, d: int, name: str, seed: int = 0) -> Tensor:
    """(p, d): the last worker is Byzantine."""
    rows = honest_rows(p - 1, d, seed)
    return torch.cat([rows, ATTACKS[name](rows)])


# --------------------------------------------------------------------------------------------
# robust_all_reduce


@check("all_reduce")
def every_rule_under_every_attack(rank, p):
    """1,001 numbers over 7 ranks are 143 each; 1,000 leave the last rank fewer."""
    for i, (rule, options) in enumerate(rules(p)):
        for attack in ATTACKS if rule != "mean" else FINITE:
            rows = attacked(p, 1001 - i % 2, attack)
            update = robust_all_reduce(rows[rank], rule, **options)
            want = dashpot.robust_aggregate(rows, rule, **options)
            assert want.isfinite().all(), (rule, attack)
            close(update, want)
            same_on_all_ranks(update)


@check("all_reduce")
def lengths_that_do_not_divide(rank, p):
    """Fewer numbers than ranks: some have nothing to do."""
    for d in (0, 1, 6, 7, 8, 100):
        rows = honest_rows(p, d)
        for rule, options in (("flag", {}), ("coordinate_median", {})):
            update = robust_all_reduce(rows[rank], rule, **options)
            close(update, dashpot.robust_aggregate(rows, rule, **options))


@check("all_reduce")
def dtypes(rank, p):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = attacked(p, 515, "scaled").to(dtype)
        for rule, options in (("flag", {"output": "rescaled"}), ("coordinate_median", {})):
            update = robust_all_reduce(rows[rank], rule, **options)
            assert update.dtype == dtype
            want = dashpot.robust_aggregate(rows, rule, **options)
            close(update, want, max(1e-5, 2 * torch.finfo(dtype).eps))
            same_on_all_ranks(update)


@check("all_reduce")
def lists_of_mixed_dtypes(rank, p):
    """One solution for all of them; not contiguous ones too; what was given stays as it is."""
    shapes = ((3, 5), (), (0, 4), (11,))
    columns = [
        honest_rows(p, 3 * 5, 1).view(p, 5, 3).mT, honest_rows(p, 1, 2)[:, 0],
        torch.zeros(p, 0, 4, dtype=torch.float64), honest_rows(p, 11, 3).float(),
    ]  # fmt: skip
    rows = [[column[i] for column in columns] for i in range(p)]
    before = copy.deepcopy(rows[rank])
    for rule, options in (("flag", {}), ("trimmed_mean", {"f": 2})):
        update = robust_all_reduce(rows[rank], rule, **options)
        want = dashpot.robust_aggregate(rows, rule, **options)
        assert [tuple(t.shape) for t in update] == list(shapes)
        for got, expected, column in zip(update, want, columns, strict=True):
            assert got.dtype == column.dtype
            close(got, expected, 1e-5)  # products of float32 rows are summed in float32
    assert all(torch.equal(a, b) for a, b in zip(rows[rank], before, strict=True))


@check("all_reduce")
def a_centre(rank, p):
    """Cut as the rows are."""
    rows, centers = honest_rows(p, 101), honest_rows(1, 101, 5)
    options = {"tau": 2.0, "n_iter": 2, "center": centers[0]}
    update = robust_all_reduce(rows[rank], "centered_clipping", **options)
    close(update, dashpot.robust_aggregate(rows, "centered_clipping", **options))
    listed = [list(row.split([40, 61])) for row in rows]
    options["center"] = list(centers[0].split([40, 61]))
    parts = robust_all_reduce(listed[rank], "centered_clipping", **options)
    close(torch.cat(parts), update)
    with pytest.raises(ValueError, match="center: expected the shapes"):
        robust_all_reduce(rows[rank, :50], "centered_clipping", tau=2.0, center=centers[0])
    with pytest.raises(ValueError, match="center: expected None"):
        RobustState("centered_clipping", tau=2.0, center=centers[0])


@check("all_reduce")
def the_same_buckets_on_every_rank(rank, p):
    """A random stage needs a generator; seeded alike, it draws alike."""
    rows = attacked(p, 100, "scaled")
    mine, theirs = (Bucketing(2, torch.Generator().manual_seed(3)) for _ in range(2))
    aggregate = dashpot.RobustAggregator("geometric_median", [mine])
    for _ in range(2):
        update = robust_all_reduce(rows[rank], aggregate)
        close(update, dashpot.robust_aggregate(rows, "geometric_median", pre=[theirs]))
    with pytest.raises(ValueError, match=r"pre\[0\]: expected a generator, seeded alike"):
        robust_all_reduce(rows[rank], "geometric_median", pre=[Bucketing(2)])
    with pytest.raises(TypeError, match="rule: expected a name with options"):
        robust_all_reduce(rows[rank], aggregate, f=1)


@check("all_reduce")
def several_under_way(rank, p):
    rows = [attacked(p, 100 + i, "sign flip", i) for i in range(3)]
    work = [robust_all_reduce(one[rank], "flag", async_op=True) for one in rows]
    for one, all_rows in zip(work, rows, strict=True):
        close(one.wait(), dashpot.robust_aggregate(all_rows, "flag"))
    assert torch.equal(work[0].wait(), work[0].wait())  # a second time: the same


@check("all_reduce")
def part_of_the_ranks(rank, p):
    members = [0, 2, 3, 5, 6]
    group = dist.new_group(members)
    if rank in members:
        rows = attacked(len(members), 99, "scaled")
        update = robust_all_reduce(rows[members.index(rank)], "krum", group, f=1)
        close(update, dashpot.robust_aggregate(rows, "krum", f=1))
        same_on_all_ranks(update, group)


@check("all_reduce")
def bytes_are_those_of_a_ring_all_reduce(rank, p):
    """Counted where the engine is called: what leaves this rank."""
    d, sent = 7 * 1000, []
    real = dist.all_to_all_single, dist.all_reduce, dashpot.distributed._all_gather

    def all_to_all(out, flat, *sizes, **options):
        sent.append(flat.numel() * flat.element_size() * (p - 1) // p)
        return real[0](out, flat, *sizes, **options)

    def all_reduce(tensor, **options):
        sent.append(2 * tensor.numel() * tensor.element_size() * (p - 1) // p)
        return real[1](tensor, **options)

    def all_gather(out, part, **options):
        sent.append(part.numel() * part.element_size() * (p - 1))
        return real[2](out, part, **options)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
    dashpot.distributed._all_gather = all_gather
    robust_all_reduce(honest_rows(p, d)[rank].float(), "flag", check=False)
    dist.all_to_all_single, dist.all_reduce, dashpot.distributed._all_gather = real
    ring = 2 * (p - 1) * d * 4 // p
    assert sent == [ring // 2, 2 * (p - 1) * 8 * p, ring // 2], sent


@check("all_reduce")
def ranks_that_differ(rank, p):
    """All of them are told, and the group works on."""
    for flat, rule in (
        (torch.zeros(8 if rank == 2 else 7), "flag"),
        (torch.zeros(7, dtype=torch.float64 if rank == 0 else torch.float32), "flag"),
        (torch.zeros(7), "coordinate_median" if rank == 1 else "flag"),
    ):
        with pytest.raises(ValueError, match=r"the same rule, shapes and dtypes .* rank 3:"):
            robust_all_reduce(flat, rule)
    with pytest.raises(TypeError, match="flat: expected float64"):
        robust_all_reduce(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="flat: expected a tensor or a list"):
        robust_all_reduce([])
    close(robust_all_reduce(torch.ones(3), "coordinate_median"), torch.ones(3))


# --------------------------------------------------------------------------------------------
# DistributedDataParallel


class Net(nn.Module):
    """Two linear layers, of which the second may be left out, and one that never runs."""

    def __init__(self, mixed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 33), nn.Linear(33, 33)
        self.last, self.never = nn.Linear(33, 3), nn.Linear(4, 4)
        self.double()
        if mixed:
            self.last.float()

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        x = self.first(x).tanh()
        x = x if skip else self.second(x).tanh()
        return self.last(x.to(self.last.weight.dtype)).square().sum()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 8, generator=generator, dtype=torch.float64)


def gradients(net: Net, p: int, step: int, skips=(), used=None) -> list[list[Tensor]]:
    """p lists of the gradients that p honest workers have, computed here; unused: zeros."""
    rows = []
    for worker in range(p):
        loss = net(batch(worker, step), worker in skips)
        grads = torch.autograd.grad(loss, used, allow_unused=True)
        rows.append(
            [torch.zeros_like(u) if g is None else g for g, u in zip(grads, used, strict=True)]
        )
    return rows


def poison(rows: list[list[Tensor]], attack: str) -> list[Tensor]:
    """What the last worker sends in place of its own gradients."""
    honest = [torch.stack(column) for column in zip(*rows[:-1], strict=True)]
    return [ATTACKS[attack](column)[0] for column in honest]


def substitute(parameters: list[Tensor], sent: list[Tensor]) -> list:
    """Hooks: backward gives `sent`, whatever it computed."""
    return [
        parameter.register_hook(lambda _, one=one: one)
        for parameter, one in zip(parameters, sent, strict=True)
    ]


class Recorder:
    """The hook, with the parameters of each bucket noted."""

    def __init__(self, state):
        self.state, self.buckets = state, []

    def hook(self, _, bucket):
        if bucket.index() == 0:
            self.buckets = []
        self.buckets.append(bucket.parameters())
        return ddp_hook(self.state, bucket)


def wrap(net: Net, state: RobustState, **options) -> tuple[DistributedDataParallel, Recorder]:
    """Buckets of about 4 KB: several, and others after the first step."""
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.004, **options)
    recorder = Recorder(state)
    ddp.register_comm_hook(None, recorder.hook)
    return ddp, recorder


def expected(rows, parameters, buckets, scope, rule, options) -> list[Tensor]:
    if scope == "global":
        return dashpot.robust_aggregate(rows, rule, **options)
    update = [None] * len(parameters)
    for bucket in buckets:
        members = [next(i for i, q in enumerate(parameters) if q is one) for one in bucket]
        part = [[row[i] for i in members] for row in rows]
        for i, one in zip(members, dashpot.robust_aggregate(part, rule, **options), strict=True):
            update[i] = one
    return update


def used_parameters(net: Net) -> list[Tensor]:
    """Without `never`, which would have no gradient."""
    net.never.requires_grad_(False)
    return [one for one in net.parameters() if one.requires_grad]


def steps(rank, p, scope, rule, options, attack, number=2, **ddp_options) -> list[int]:
    """Backward passes, each compared with the rule on all gradients; returns the bucket counts."""
    net = Net()
    parameters = used_parameters(net)
    twin = copy.deepcopy(net)
    twins = used_parameters(twin)
    ddp, recorder = wrap(net, RobustState(rule, scope=scope, **options), **ddp_options)
    counts = []
    for step in range(number):
        rows = gradients(twin, p, step, used=twins)
        rows[-1] = poison(rows, attack)
        hooks = substitute(parameters, rows[-1]) if rank == p - 1 else []
        ddp.zero_grad()
        ddp(batch(rank, step)).backward()
        for hook in hooks:
            hook.remove()
        want = expected(rows, parameters, recorder.buckets, scope, rule, options)
        for parameter, one in zip(parameters, want, strict=True):
            close(parameter.grad, one)
        counts.append(len(recorder.buckets))
    return counts


@check("ddp")
def ddp_every_rule(rank, p):
    for rule, options in rules(p):
        for scope in ("global", "bucket"):
            steps(rank, p, scope, rule, options, "scaled")


@check("ddp")
def ddp_every_attack(rank, p):
    for attack in ATTACKS:
        steps(rank, p, "global", "flag", {"output": "rescaled"}, attack)
        steps(rank, p, "bucket", "coordinate_median", {}, attack)


@check("ddp")
def ddp_buckets_that_change(rank, p):
    """DDP cuts its buckets anew after the first step."""
    for scope in ("global", "bucket"):
        counts = steps(rank, p, scope, "flag", {}, "sign flip", number=3)
        assert counts[0] < counts[1] == counts[2], counts


@check("ddp")
def ddp_options(rank, p):
    for options in ({"gradient_as_bucket_view": True}, {"static_graph": True}):
        steps(rank, p, "global", "flag", {}, "scaled", number=3, **options)


@check("ddp")
def ddp_accumulation(rank, p):
    """Inside no_sync nothing is sent; then the sums of both passes are aggregated."""
    net = Net()
    parameters = used_parameters(net)
    twin = copy.deepcopy(net)
    twins = used_parameters(twin)
    ddp, recorder = wrap(net, RobustState("flag", output="rescaled"))
    for first in (0, 2):
        rows = [
            [a + b for a, b in zip(*pair, strict=True)]
            for pair in zip(gradients(twin, p, first, used=twins),
                            gradients(twin, p, first + 1, used=twins), strict=True)
        ]  # fmt: skip
        ddp.zero_grad()
        recorder.buckets = []
        with ddp.no_sync():
            ddp(batch(rank, first)).backward()
        assert recorder.buckets == []
        ddp(batch(rank, first + 1)).backward()
        want = dashpot.robust_aggregate(rows, "flag", output="rescaled")
        for parameter, one in zip(parameters, want, strict=True):
            close(parameter.grad, one)


@check("ddp")
def ddp_unused_parameters(rank, p):
    """Rank 1 leaves a layer out: zeros in its row. What no rank uses keeps no gradient."""
    net = Net()
    twin = copy.deepcopy(net)
    used = [q for name, q in twin.named_parameters() if not name.startswith("never")]
    mine = [q for name, q in net.named_parameters() if not name.startswith("never")]
    for scope in ("global", "bucket"):
        ddp, recorder = wrap(net, RobustState("coordinate_median", scope=scope),
                             find_unused_parameters=True)  # fmt: skip
        for step in range(2):
            rows = gradients(twin, p, step, skips=(1,), used=used)
            ddp.zero_grad()
            ddp(batch(rank, step), rank == 1).backward()
            want = dashpot.robust_aggregate(rows, "coordinate_median")
            for parameter, one in zip(mine, want, strict=True):
                close(parameter.grad, one)
            assert net.never.weight.grad is None
        assert len(recorder.buckets) > 1


@check("ddp")
def ddp_mixed_dtypes(rank, p):
    """float64 and float32 parameters lie in different buckets and share one solution."""
    net = Net(mixed=True)
    parameters = used_parameters(net)
    twin = copy.deepcopy(net)
    ddp, _ = wrap(net, RobustState("flag"))
    rows = gradients(twin, p, 0, used=used_parameters(twin))
    ddp(batch(rank, 0)).backward()
    for parameter, one in zip(parameters, dashpot.robust_aggregate(rows, "flag"), strict=True):
        close(parameter.grad, one, 1e-6)  # products of float32 rows are summed in float32


@check("ddp")
def ddp_two_models(rank, p):
    """A state for each; one state for both is an error once their buckets mix."""
    nets = [Net(), Net()]
    parameters = [used_parameters(net) for net in nets]
    twins = [copy.deepcopy(net) for net in nets]
    want = [
        dashpot.robust_aggregate(gradients(twin, p, i, used=used_parameters(twin)), "flag")
        for i, twin in enumerate(twins)
    ]
    ddps = [wrap(net, RobustState("flag"))[0] for net in nets]
    sum(ddp(batch(rank, i)) for i, ddp in enumerate(ddps)).backward()
    for own, one in zip(parameters, want, strict=True):
        for parameter, update in zip(own, one, strict=True):
            close(parameter.grad, update)

    net = Net()
    parameters, twin = used_parameters(net), copy.deepcopy(net)
    ddp = DistributedDataParallel(net)
    ddp.register_comm_hook(RobustState("flag"), ddp_hook)  # as it is
    ddp(batch(rank, 0)).backward()
    rows = gradients(twin, p, 0, used=used_parameters(twin))
    for parameter, one in zip(parameters, dashpot.robust_aggregate(rows, "flag"), strict=True):
        close(parameter.grad, one)

    class Bucket:
        def index(self):
            return 2

    with pytest.raises(RuntimeError, match="expected bucket 0, got 2: one RobustState serves one"):
        ddp_hook(RobustState("flag"), Bucket())


# --------------------------------------------------------------------------------------------
# FSDP2


def shards(net: nn.Module, rule: str, **options) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (net.first, net.second):
        fully_shard(part, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return robust_fully_shard(net, rule, **options)


def groups(parameters: list[Tensor]) -> list[list[int]]:
    """Which parameters FSDP aggregates together: weight and bias of `first`, of `second`, rest."""
    return [[0, 1], [2, 3], list(range(4, len(parameters)))]


def compare_shards(net, rows, rule, options, tolerance=1e-12) -> None:
    parameters = [one for one in net.parameters() if one.requires_grad]
    for members in groups(parameters):
        part = [[row[i] for i in members] for row in rows]
        want = dashpot.robust_aggregate(part, rule, **options)
        for i, one in zip(members, want, strict=True):
            assert parameters[i].grad.to_local().numel() < one.numel()
            close(parameters[i].grad.full_tensor(), one, tolerance)


def fsdp_step(rank, p, rule, options, attack) -> None:
    net = Net()
    used_parameters(net)
    twin = copy.deepcopy(net)
    rows = gradients(twin, p, 0, used=used_parameters(twin))
    rows[-1] = poison(rows, attack)
    shards(net, rule, **options)
    if rank == p - 1:
        for i, layer in enumerate((net.first, net.second, net.last)):
            sabotage(layer, rows[-1][2 * i : 2 * i + 2])
    net(batch(rank, 0)).backward()
    compare_shards(net, rows, rule, options)


@check("fsdp")
def fsdp_every_rule(rank, p):
    """33 rows over 4 ranks: FSDP pads."""
    for rule, options in rules(p):
        fsdp_step(rank, p, rule, options, "scaled")


@check("fsdp")
def fsdp_every_attack(rank, p):
    for attack in ATTACKS:
        fsdp_step(rank, p, "flag", {"output": "rescaled"}, attack)


@check("fsdp_of_two")
def fsdp_every_rule_of_two(rank, p):
    """Too few to withstand anything, and still what the rule gives."""
    for rule, options in rules(p):
        fsdp_step(rank, p, rule, options, "none")


class _Substitute(torch.autograd.Function):
    """The parameter; its gradient is `sent`."""

    @staticmethod
    def forward(ctx, parameter, sent):
        ctx.sent = sent
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, grad):
        return ctx.sent, None


def sabotage(layer: nn.Linear, sent: list[Tensor]) -> None:
    """FSDP exchanges parameters around each forward: the substitution sits in the forward."""

    def forward(x):
        weight = _Substitute.apply(layer.weight, sent[0])
        return nn.functional.linear(x, weight, _Substitute.apply(layer.bias, sent[1]))

    layer.forward = forward


@check("fsdp")
def fsdp_several_steps(rank, p):
    """Gradients accumulate without communication where FSDP is told so."""
    net = Net()
    twin = copy.deepcopy(net)
    used_parameters(net)
    twins = used_parameters(twin)
    shards(net, "coordinate_median")
    net.set_requires_gradient_sync(False)
    net(batch(rank, 0)).backward()
    net.set_requires_gradient_sync(True)
    net(batch(rank, 1)).backward()
    rows = [
        [a + b for a, b in zip(*pair, strict=True)]
        for pair in zip(gradients(twin, p, 0, used=twins), gradients(twin, p, 1, used=twins),
                        strict=True)
    ]  # fmt: skip
    compare_shards(net, rows, "coordinate_median", {})
    net.zero_grad()
    net(batch(rank, 2)).backward()
    compare_shards(net, gradients(twin, p, 2, used=twins), "coordinate_median", {})


@check("fsdp")
def fsdp_float32(rank, p):
    net = Net()
    twin = copy.deepcopy(net).float()
    used_parameters(net.float())
    shards(net, "flag")
    x = [batch(worker, 0).float() for worker in range(p)]
    rows = [list(torch.autograd.grad(twin(one), used_parameters(twin))) for one in x]
    net(x[rank]).backward()
    compare_shards(net, rows, "flag", {}, 1e-5)


@check("fsdp")
def fsdp_errors(rank, p):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="module: expected fully_shard to be applied first"):
        robust_fully_shard(Net(), "flag")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(ValueError, match="module: expected parameters that are sharded only"):
        robust_fully_shard(fully_shard(Net(), mesh=mesh), "flag")
    comm = RobustReduceScatter("flag")
    out, flat = torch.empty(2), torch.ones(2 * p)
    with pytest.raises(RuntimeError, match="op: expected AVG"):
        comm(out, flat, None, dist.ReduceOp.SUM)
    with pytest.raises(ValueError, match="async_op: expected False"):
        comm(out, flat, None, dist.ReduceOp.AVG, async_op=True)
    comm(out, flat, None, dist.ReduceOp.AVG)
    assert out.isfinite().all()


# --------------------------------------------------------------------------------------------
# A rank that dies


@check("dead")
def a_rank_dies(rank, p):
    net = Net()
    used_parameters(net)
    ddp, _ = wrap(net, RobustState("flag"))
    ddp(batch(rank, 0)).backward()
    robust_all_reduce(torch.ones(10), "flag")
    if rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        robust_all_reduce(torch.ones(10), "flag")
    with pytest.raises(RuntimeError):
        ddp(batch(rank, 1)).backward()
    assert time.monotonic() - start < 3 * DEAD_AFTER
    if rank == 0:
        note("a_rank_dies")


# --------------------------------------------------------------------------------------------


def note(name: str) -> None:
    with (Path(sys.argv[2]) / "passed").open("a") as file:
        file.write(f"{name}\n")


def run(rank: int, group: str, folder: str) -> None:
    p, checks = GROUPS[group]
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", p)
    timeout = timedelta(seconds=DEAD_AFTER if group == "dead" else 60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=p, timeout=timeout)
    for one in checks:
        one(rank, p)
        if group == "dead":
            os._exit(0)  # the group cannot be closed any more
        dist.barrier()
        if rank == 0:
            note(one.__name__)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.start_processes(
        run, sys.argv[1:], nprocs=GROUPS[sys.argv[1]][0], start_method="fork"
    )
