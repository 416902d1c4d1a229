"""Experts split over ranks: real processes, one thread each, against the layer in one process.

A world of W ranks is started once and runs every check (`check_*`), each on all ranks; this file is
also the program of a rank."""

from __future__ import annotations

import copy
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from dashpot.experts import (
    StochasticExperts,
    SwitchExperts,
    TopKExperts,
    auxiliary_loss,
    convert,
    restore,
    shard_experts,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

D, H, E = 6, 10, 8
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
PARAMETERS = ("w1", "b1", "w2", "b2")


CHECKS = 20


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks, tmp_path):
    logs = [tmp_path / f"{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(logs):
        program = [sys.executable, __file__, str(tmp_path / "store"), str(ranks), str(rank)]
        with log.open("w") as out:
            processes.append(subprocess.Popen(program, stdout=out, stderr=out))
    limit = time.monotonic() + 300
    try:  # one rank that fails leaves the others waiting
        while time.monotonic() < limit and any(p.poll() is None for p in processes):
            if any(p.poll() for p in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [log.read_text() for log in logs]
    assert [p.returncode for p in processes] == [0] * ranks, "\n\n".join(texts)
    assert all(text.count("passed check_") == CHECKS for text in texts)


# --------------------------------------------------------------------------------------------
# What the checks share


class World:
    def __init__(self, rank: int, ranks: int):
        self.rank, self.ranks = rank, ranks

    def tokens(self, lengths=None) -> list[torch.Tensor]:
        """Every rank's tokens, of unequal numbers; each rank knows all."""
        generator = torch.Generator().manual_seed(7)
        lengths = lengths or [5 + 3 * rank for rank in range(self.ranks)]
        return [torch.randn(n, D, generator=generator, **DOUBLE) for n in lengths]

    def compare(self, layer, call, lengths=None, rows=None, capacity=None) -> None:
        """The split layer's outputs and gradients against those of the whole one, which sees every
        rank's tokens in turn. call(layer, x, rank) -> y."""
        whole, tokens = copy.deepcopy(layer), self.tokens(lengths)
        xs = [x.clone().requires_grad_() for x in tokens]
        ys = [call(whole, x, rank) for rank, x in enumerate(xs)]
        weights = [torch.linspace(1, 2, y.numel(), **DOUBLE).view_as(y) for y in ys]
        sum((y * w).sum() for y, w in zip(ys, weights, strict=True)).backward()

        changed = shard_experts(layer, rows_per_expert=rows)
        assert len(changed) == sum(getattr(layer, name) is not None for name in PARAMETERS)
        x = tokens[self.rank].clone().requires_grad_()
        y = call(layer, x, self.rank)
        (y * weights[self.rank]).sum().backward()
        torch.testing.assert_close(y, ys[self.rank], **EXACT)
        torch.testing.assert_close(x.grad, xs[self.rank].grad, **EXACT)
        here = slice(self.rank * E // self.ranks, (self.rank + 1) * E // self.ranks)
        for name in PARAMETERS:
            part, full = getattr(layer, name), getattr(whole, name)
            if full is not None:
                assert part.shape == full[here].shape
                torch.testing.assert_close(part.grad, full.grad[here], **EXACT)
        for (name, part), full in zip(layer.named_parameters(), whole.parameters(), strict=True):
            if name not in PARAMETERS:  # a router: each rank has the gradient of its own tokens
                dist.all_reduce(part.grad)
                torch.testing.assert_close(part.grad, full.grad, **EXACT)


def by_rank(layer, x, rank):
    """Routes that differ between ranks."""
    return layer(x, offset=rank)


def plainly(layer, x, rank):
    return layer(x)


# --------------------------------------------------------------------------------------------
# The layer, split


def check_as_many_as_there_are(world):
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank)


def check_gated_without_bias(world):
    layer = StochasticExperts(D, H, E, gated=True, bias=False, activation="silu", **DOUBLE)
    world.compare(layer, by_rank)


def check_unfused_activation(world):
    world.compare(StochasticExperts(D, H, E, activation="gelu_tanh", **DOUBLE), by_rank)


def check_rank_without_tokens(world):
    lengths = [0] + [6] * (world.ranks - 1)
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank, lengths)
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank, lengths, rows=6)


def check_no_tokens_at_all(world):
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank, [0] * world.ranks)
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank, [0] * world.ranks, rows=3)


def check_all_tokens_on_one_expert(world):
    layer = StochasticExperts(D, H, E, inference="fixed", fixed_expert=E - 1, **DOUBLE)
    world.compare(layer.eval(), plainly)


def check_average(world):
    world.compare(StochasticExperts(D, H, E, inference="average", **DOUBLE).eval(), plainly)


def check_batch_level(world):
    world.compare(StochasticExperts(D, H, E, "batch", **DOUBLE), by_rank)


def check_top_k(world):
    world.compare(TopKExperts(D, H, E, 3, **DOUBLE), plainly)


def check_capacity(world):
    for layer in (
        SwitchExperts(D, H, E, capacity_factor=1.0, **DOUBLE),
        TopKExperts(D, H, E, 2, capacity_factor=0.7, priority="score", **DOUBLE),
    ):
        dropped = layer(world.tokens()[0]).abs().sum(-1) == 0
        world.compare(layer, plainly)
        assert layer.k > 1 or dropped.any()


def check_padded_rows(world):
    """Room for all: the same result without a number read by the host."""
    world.compare(StochasticExperts(D, H, E, **DOUBLE), by_rank, rows=5 + 3 * world.ranks)
    world.compare(TopKExperts(D, H, E, 2, **DOUBLE), plainly, rows=5 + 3 * world.ranks)


def check_padded_rows_drop_what_is_beyond(world):
    """As a capacity of the whole layer."""

    def with_capacity(layer, x, rank):
        ids = layer.routes(x, offset=rank)
        capacity = None if layer.exchange is not None else 1
        return layer.dispatch(x, ids, capacity=capacity)

    layer = StochasticExperts(D, H, E, **DOUBLE)
    x = world.tokens([20] * world.ranks)[world.rank]
    assert (with_capacity(layer, x, world.rank).abs().sum(-1) == 0).any()
    world.compare(layer, with_capacity, [20] * world.ranks, rows=1)


def check_checkpointing(world):
    """Collectives are repeated in the backward, in the same order on all ranks."""

    def call(layer, x, rank):
        torch.manual_seed(rank)
        return checkpoint(layer, x, use_reentrant=False)

    world.compare(StochasticExperts(D, H, E, **DOUBLE), call)


def check_compiled(world):
    """With padded rows the exchange is part of one graph, so no number is read by the host."""
    layer = StochasticExperts(D, H, E, offset=world.rank, **DOUBLE)
    shard_experts(layer, rows_per_expert=4)
    x = torch.randn(9, D, **DOUBLE).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want, got = layer(x), compiled(x)
    torch.testing.assert_close(got, want, **EXACT)
    grads = [torch.autograd.grad((y * y).sum(), [x, layer.w1])[0] for y in (got, want)]
    torch.testing.assert_close(*grads, **EXACT)


def check_autocast(world):
    layer = StochasticExperts(D, H, E)
    shard_experts(layer)
    x = torch.randn(9, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.w1.grad.dtype == torch.float32


def check_losses_of_the_router(world):
    """They are of the router's logits alone: splitting changes nothing."""
    layer = TopKExperts(D, H, E, 2, **DOUBLE)
    x = world.tokens()[world.rank]
    layer(x)
    want = auxiliary_loss(layer)
    shard_experts(layer)
    layer(x)
    assert torch.equal(auxiliary_loss(layer), want)


def check_errors(world):
    with pytest.raises(ValueError, match=f"E: expected a multiple of the {world.ranks} ranks"):
        shard_experts(StochasticExperts(D, H, world.ranks + 1))
    with pytest.raises(ValueError, match="holds layers of experts, got none"):
        shard_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rows_per_expert: expected 1 <="):
        shard_experts(StochasticExperts(D, H, E), rows_per_expert=0)
    layer = StochasticExperts(D, H, E)
    shard_experts(layer)
    with pytest.raises(ValueError, match="got a split one"):
        shard_experts(layer)
    with pytest.raises(ValueError, match="expected all experts here"):
        layer.load_thor_state_dict({})
    model = nn.Sequential(nn.TransformerEncoderLayer(D, 2, H, batch_first=True))
    convert(model, E)
    shard_experts(model)
    with pytest.raises(ValueError, match="expert: expected a model whose experts are all on this"):
        restore(model, expert=0)
    restore(model)
    assert isinstance(model[0].linear1, nn.Linear)


# --------------------------------------------------------------------------------------------
# Data parallelism


class Listed(nn.Module):
    """Experts as modules of their own, as the published code holds them; one is run."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D, **DOUBLE) for _ in range(2))

    def forward(self, x):
        return self.experts[0](x)


def check_data_parallel_has_no_unused_parameters(world):
    """At batch level only one expert is run. Stacked weights get zeros for the others, so nothing
    is unused; with experts as modules the second step is refused."""
    x = torch.randn(4, 3, D, **DOUBLE)
    stacked = DistributedDataParallel(StochasticExperts(D, H, E, "batch", **DOUBLE))
    for _ in range(3):
        stacked.zero_grad()
        stacked(x).sum().backward()
        assert all(p.grad is not None for p in stacked.parameters())
    listed = DistributedDataParallel(Listed())
    listed(x).sum().backward()
    with pytest.raises(RuntimeError, match="not used in producing loss"):
        listed(x).sum().backward()


def check_data_parallel_converted_model(world):
    """Gradients are the mean over the ranks', each with its own tokens and routes."""
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True, **DOUBLE), 2
    )
    convert(encoder, 3, layers="all", level="sequence")
    alone = copy.deepcopy(encoder)
    xs = [torch.randn(4, 5, D, **DOUBLE) for _ in range(world.ranks)]
    for rank, x in enumerate(xs):
        torch.manual_seed(rank)
        (alone(x).square().sum() / world.ranks).backward()
    together = DistributedDataParallel(encoder)
    torch.manual_seed(world.rank)
    together(xs[world.rank]).square().sum().backward()
    for got, want in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **EXACT)


def check_data_parallel_with_split_experts(world):
    """DistributedDataParallel averages the rest and leaves the experts alone, whose gradients are
    sums: the docstring's factor W."""
    model = nn.Sequential(nn.Linear(D, D, **DOUBLE), TopKExperts(D, H, E, 2, **DOUBLE))
    alone = copy.deepcopy(model)
    tokens = world.tokens()
    sum(alone(x).sum() for x in tokens).backward()
    changed = {id(p) for p in shard_experts(model)}
    names = [name for name, p in model.named_parameters() if id(p) in changed]
    assert names == [f"1.{name}" for name in PARAMETERS]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    together = DistributedDataParallel(model)
    together(tokens[world.rank]).sum().backward()
    here = slice(world.rank * E // world.ranks, (world.rank + 1) * E // world.ranks)
    for (name, got), want in zip(model.named_parameters(), alone.parameters(), strict=True):
        expected = want.grad[here] if name in names else want.grad / world.ranks
        torch.testing.assert_close(got.grad, expected, **EXACT)


# --------------------------------------------------------------------------------------------


def main(store: str, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            check(World(rank, ranks))
            print(f"passed {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
