"""The hook of DistributedDataParallel, by four ranks; the last one may be Byzantine."""

from __future__ import annotations

import copy

import dashpot
import pytest
from common import ATTACKS, Net, batch, check, close, gradients, poison, rules, used_parameters
from dashpot.distributed import RobustState, ddp_hook
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


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
