"""FSDP2 with a rule for its reduce-scatter, by four ranks and by two."""

from __future__ import annotations

import copy

import dashpot
import pytest
import torch
import torch.distributed as dist
from common import ATTACKS, Net, batch, check, close, gradients, poison, rules, used_parameters
from dashpot.distributed import RobustReduceScatter, robust_fully_shard
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shards(net: nn.Module, rule: str, **options) -> nn.Module:
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


@check("fsdp_of_two")
def fsdp_attacks_of_two(rank, p):
    """ALIE needs a deviation of honest rows; a flipped sign leaves nothing of two rows, of which
    `flag` sees the direction alone."""
    for attack in ("NaN", "inf"):
        fsdp_step(rank, p, "flag", {"output": "rescaled"}, attack)
    for attack in ("NaN", "inf", "scaled"):
        fsdp_step(rank, p, "geometric_median", {}, attack)


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
