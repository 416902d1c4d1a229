"""StochasticExperts, TopKExperts, SwitchExperts: what they compute, how routes are drawn."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from dashpot.experts import (
    StochasticExperts,
    advance,
    random_plan,
    route_balanced,
    route_random,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

stochastic_file = sys.modules["dashpot.experts.stochastic"]
D, H, E = 6, 10, 4
LEVELS = ("token", "sequence", "batch")
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


# --------------------------------------------------------------------------------------------
# What is computed


def test_levels():
    """One expert for each token, each sequence, or the batch, drawn by route_random."""
    x = batch(8, 5)
    for level, units in zip(LEVELS, (40, 8, 1), strict=True):
        layer = StochasticExperts(D, H, E, level, offset=7)
        drawn = route_random(units, E, seed=layer.seed, offset=7)[:, 0]
        assert torch.equal(layer.routes(x)[:, 0], drawn.repeat_interleave(40 // units))
        assert layer.routes(x).dtype == torch.int32


def test_sequences_along_another_axis():
    """(S, B, d) with batch_dim=1, and seq_ids, route as (B, S, d)."""
    x = batch(8, 5)
    layer = StochasticExperts(D, H, E, "sequence", offset=0, **DOUBLE)
    want = layer(x)
    ids = torch.arange(8)[:, None].expand(8, 5)
    assert len(set(layer.routes(x).flatten().tolist())) > 1
    assert torch.equal(layer(x, seq_ids=ids, num_seqs=8), want)
    flat = layer(x.reshape(40, D), seq_ids=ids.flatten().int(), num_seqs=8)
    assert torch.equal(flat.view_as(want), want)
    layer.batch_dim = 1
    assert torch.equal(layer(x.transpose(0, 1)).transpose(0, 1), want)


def test_the_published_sentence_level_is_by_position(one_expert):
    """The published inference stacks all experts' outputs, [E, T, B, C], and masks along axis 1.
    That is time: all sentences share the expert of a position. seq_ids= the positions does this;
    level "sequence" gives a sentence one expert."""
    time, sentences = 7, 3
    x = batch(time, sentences)  # [T, B, C]
    layer = StochasticExperts(D, H, E, "sequence", batch_dim=1, offset=2, **DOUBLE).eval()
    drawn = route_random(time, E, seed=layer.seed, offset=2)[:, 0].long()
    stack = torch.stack([one_expert(layer, e, x) for e in range(E)])  # [E, T, B, C]
    mask = F.one_hot(drawn, E).T.to(stack)[:, :, None, None]  # [E, T, 1, 1]
    published = (stack * mask).sum(0)
    positions = torch.arange(time)[:, None].expand(time, sentences)
    got = layer(x, seq_ids=positions, num_seqs=time)
    torch.testing.assert_close(got, published, **EXACT)
    routes = layer.routes(x).view(time, sentences)
    assert (routes == routes[:1]).all() and not torch.equal(layer(x), got)


def test_the_published_token_level(one_expert):
    """Level 0 of the published inference: a mask for each token over all experts' outputs."""
    x = batch(5, 4)
    layer = StochasticExperts(D, H, E, offset=2, **DOUBLE).eval()
    stack = torch.stack([one_expert(layer, e, x) for e in range(E)])
    mask = F.one_hot(layer.routes(x).view(5, 4).long(), E).movedim(-1, 0)[..., None]
    torch.testing.assert_close(layer(x), (stack * mask).sum(0), **EXACT)


def test_the_published_training_draws_one_expert_for_the_batch(one_expert):
    x = batch(5, 4)
    layer = StochasticExperts(D, H, E, "batch", **DOUBLE)
    for _ in range(5):
        torch.manual_seed(_)
        y = layer(x)
        fits = [torch.allclose(y, one_expert(layer, e, x), **EXACT) for e in range(E)]
        assert sum(fits) == 1


# --------------------------------------------------------------------------------------------
# Inference


def test_inference_average_is_the_mean_of_outputs(one_expert):
    layer = StochasticExperts(D, H, E, inference="average", **DOUBLE).eval()
    x = batch(3, 5)
    want = torch.stack([one_expert(layer, e, x) for e in range(E)]).mean(0)
    torch.testing.assert_close(layer(x), want, **EXACT)
    merged = copy.deepcopy(layer)
    with torch.no_grad():
        for p in merged.parameters():
            p.copy_(p.mean(0, keepdim=True).expand_as(p))
    assert (one_expert(merged, 0, x) - want).abs().max() > 1e-3  # the mean of weights is not it


@pytest.mark.parametrize("expert", [0, 3])
def test_inference_fixed_is_one_expert(expert, one_expert):
    layer = StochasticExperts(D, H, E, inference="fixed", fixed_expert=expert, **DOUBLE).eval()
    x = batch(3, 5)
    torch.testing.assert_close(layer(x), one_expert(layer, expert, x), **EXACT)


@pytest.mark.parametrize("level", LEVELS)
def test_inference_random_draws_as_in_training(level):
    layer = StochasticExperts(D, H, E, level, offset=5, **DOUBLE)
    x = batch(3, 5)
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_inference_modes_do_not_touch_training(by_hand):
    x = batch(3, 5)
    for mode in ("average", "fixed"):
        layer = StochasticExperts(D, H, E, inference=mode, offset=1, **DOUBLE)
        torch.testing.assert_close(layer(x), by_hand(layer, x, layer.routes(x)), **EXACT)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
def test_tokens_are_planned_without_their_ids(monkeypatch, training, passes):
    """Random tokens take one call, random_plan, and what it gives is what `routes` says; balanced,
    distinct or doubled along another axis, they go by ids."""
    layer = StochasticExperts(D, H, E, num_passes=passes, offset=3, **DOUBLE).train(training)
    x, calls = batch(6, 5), []
    want = layer.dispatch(x.view(-1, D), layer.routes(x)).view_as(x)

    def planned(*args, **kwargs):
        calls.append(args)
        return random_plan(*args, **kwargs)

    monkeypatch.setattr(stochastic_file, "random_plan", planned)
    monkeypatch.setattr(stochastic_file, "route_random", None)
    assert torch.equal(layer(x), want)
    assert calls == [(30 // passes if training else 30, E)]
    monkeypatch.undo()
    monkeypatch.setattr(stochastic_file, "random_plan", None)
    for name, value in (("balanced", True), ("distinct_passes", True), ("level", "batch")):
        other = copy.deepcopy(layer)
        setattr(other, name, value)
        assert other(x).shape == x.shape


# --------------------------------------------------------------------------------------------
# Two passes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
def test_a_doubled_batch_is_two_passes(level, batch_dim, balanced, distinct):
    if balanced and level == "batch":
        balanced = False
    layer = StochasticExperts(
        D, H, E, level, balanced=balanced, distinct_passes=distinct, batch_dim=batch_dim,
        offset=11, **DOUBLE,
    )  # fmt: skip
    x = batch(6, 8)
    passes = [layer(x, pass_id=p) for p in range(2)]
    routes = [layer.routes(x, pass_id=p) for p in range(2)]
    layer.num_passes = 2
    doubled = torch.cat([x, x], batch_dim)
    torch.testing.assert_close(layer(doubled), torch.cat(passes, batch_dim), **EXACT)
    if distinct:
        assert (routes[0] != routes[1]).all()
    elif level == "token":
        assert 0 < (routes[0] == routes[1]).sum() < len(routes[0])
    layer.eval()
    assert layer.routes(x).shape == (48, 1)  # two passes are of training alone


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_a_doubled_batch_with_sequence_ids(batch_dim):
    layer = StochasticExperts(D, H, E, "sequence", offset=4, batch_dim=batch_dim, **DOUBLE)
    x, ids = batch(6, 8), torch.randint(5, (6, 8))
    want = [layer(x, seq_ids=ids, num_seqs=5, pass_id=p) for p in range(2)]
    layer.num_passes = 2
    got = layer(torch.cat([x, x], batch_dim), seq_ids=torch.cat([ids, ids], batch_dim), num_seqs=5)
    torch.testing.assert_close(got, torch.cat(want, batch_dim), **EXACT)


def test_independent_passes_meet_once_in_E():
    layer = StochasticExperts(D, H, E, offset=0)
    x = torch.zeros(20_000, D)
    same = (layer.routes(x) == layer.routes(x, pass_id=1)).double().mean()
    assert abs(same - 1 / E) < 4 * (1 / E * (1 - 1 / E) / 20_000) ** 0.5


def test_distinct_passes_need_one_offset():
    layer = StochasticExperts(D, H, E, distinct_passes=True, **DOUBLE)
    x = batch(3, 5)
    layer(x)
    with pytest.raises(ValueError, match="pass_id: distinct passes share an offset"):
        layer(x, pass_id=1)
    offset = torch.tensor(9)
    first, second = (layer.routes(x, pass_id=p, offset=offset) for p in range(2))
    assert (first != second).all()


def test_balanced_routes():
    """Counts differ by at most one; route_balanced, turned by a number of its own."""
    for units, level in ((30, "token"), (6, "sequence")):
        layer = StochasticExperts(D, H, E, level, balanced=True, offset=1)
        x = batch(6, 5)
        routes = layer.routes(x).view(6, 5)
        counts = (routes if level == "token" else routes[:, 0]).flatten().bincount(minlength=E)
        assert counts.max() - counts.min() <= 1
        flat = (routes if level == "token" else routes[:, 0]).flatten()
        turned = (flat - route_balanced(units, E, seed=layer.seed, offset=1)) % E
        assert (turned == turned[0]).all()


def test_balanced_routes_of_few_units_reach_every_expert():
    """Two sequences and four experts: without the turn, experts 1 and 3 would never be used."""
    layer = StochasticExperts(D, H, E, "sequence", balanced=True)
    seen = {e for _ in range(60) for e in layer.routes(batch(2, 1)).flatten().tolist()}
    assert seen == set(range(E))


# --------------------------------------------------------------------------------------------
# Seed and offset


def test_layers_have_seeds_of_their_own():
    torch.manual_seed(3)
    first, second = (StochasticExperts(D, H, E, offset=0) for _ in range(2))
    assert first.seed != second.seed
    x = batch(100)
    assert not torch.equal(first.routes(x), second.routes(x))
    torch.manual_seed(3)
    assert torch.equal(StochasticExperts(D, H, E, offset=0).routes(x), first.routes(x))


def test_drawn_offsets_are_fresh_and_repeatable():
    layer, x = StochasticExperts(D, H, E, **DOUBLE), batch(50)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first) and torch.equal(layer(x), second)
    assert not torch.equal(first, second)
    assert layer.offset is None and "offset" not in layer.state_dict()


def test_a_counter_moves_when_told():
    layer, x = StochasticExperts(D, H, E, offset=5), batch(50)
    before = layer.routes(x)
    assert torch.equal(layer.routes(x), before)
    counter = layer.offset
    advance(layer)
    assert layer.offset is counter and counter == 7  # in place: a captured graph sees it
    assert not torch.equal(layer.routes(x), before)
    assert torch.equal(layer.routes(x, offset=5), before)
    assert torch.equal(layer.routes(x, offset=torch.tensor(5)), before)


def test_advance_needs_counters():
    with pytest.raises(ValueError, match=r"counter .* got none"):
        advance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"counter .* got one without"):
        advance(nn.ModuleList([StochasticExperts(D, H, E), StochasticExperts(D, H, E, offset=0)]))


@pytest.mark.parametrize("offset", [None, 4])
def test_state_dict_keeps_the_routes(offset):
    layer = StochasticExperts(D, H, E, offset=offset, **DOUBLE)
    other = StochasticExperts(D, H, E, offset=None if offset is None else 0, **DOUBLE)
    other.load_state_dict(layer.state_dict())
    x = batch(3, 5)
    torch.manual_seed(1)
    want = layer(x)
    torch.manual_seed(1)
    assert torch.equal(other(x), want)
    keys = {"w1", "b1", "w2", "b2", "seed"} | ({"offset"} if offset is not None else set())
    assert set(layer.state_dict()) == keys


def test_a_call_writes_no_state():
    """So that it may be repeated, and captured: buffers are the same, version and all."""
    for offset in (None, 3):
        layer = StochasticExperts(D, H, E, offset=offset)
        before = {name: (b.clone(), b._version) for name, b in layer.named_buffers()}
        layer(torch.randn(3, 5, D)).sum().backward()
        for name, buffer in layer.named_buffers():
            assert torch.equal(buffer, before[name][0]) and buffer._version == before[name][1]


# --------------------------------------------------------------------------------------------
# Activation checkpointing


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("offset", [None, 0])
def test_recomputed_layers_find_the_same_routes(use_reentrant, level, offset):
    """Two micro-batches in flight, each through two layers, before one backward."""
    layers = [StochasticExperts(D, H, 8, level, offset=offset, **DOUBLE) for _ in range(2)]
    inputs = [batch(4, 5).requires_grad_() for _ in range(2)]
    wanted = [*inputs, *(p for layer in layers for p in layer.parameters())]

    def gradients(call):
        torch.manual_seed(2)
        outputs = inputs
        for layer in layers:
            outputs = [call(layer, x) for x in outputs]
        return torch.autograd.grad(sum((y * y).sum() for y in outputs), wanted)

    plain = gradients(lambda layer, x: layer(x))
    kept = gradients_by_backward(wanted, lambda: gradients_sum(
        layers, inputs, lambda layer, x: checkpoint(layer, x, use_reentrant=use_reentrant)
    ))  # fmt: skip
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)


def gradients_sum(layers, inputs, call):
    torch.manual_seed(2)
    outputs = inputs
    for layer in layers:
        outputs = [call(layer, x) for x in outputs]
    return sum((y * y).sum() for y in outputs)


def gradients_by_backward(wanted, loss):
    """Re-entrant checkpointing knows backward() alone."""
    for tensor in wanted:
        tensor.grad = None
    loss().backward()
    return [tensor.grad for tensor in wanted]


def test_the_test_above_would_see_other_routes():
    layer = StochasticExperts(D, H, 8, **DOUBLE)
    x = batch(40).requires_grad_()

    def gradient(keep):
        torch.manual_seed(2)
        y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=keep)
        return torch.autograd.grad((y * y).sum(), x)[0]

    torch.manual_seed(2)
    (plain,) = torch.autograd.grad((layer(x) ** 2).sum(), x)
    assert torch.equal(gradient(True), plain)
    assert not torch.equal(gradient(False), plain)


# --------------------------------------------------------------------------------------------
# torch.compile, autocast, inputs of every kind


@pytest.mark.parametrize("level", LEVELS)
def test_compiled(level):
    """One graph, the same routes from a counter, and a new value of it is not a new graph."""
    torch._dynamo.reset()
    layer = StochasticExperts(D, H, E, level, balanced=level == "token", offset=0, **DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = batch(3, 5).requires_grad_()
    seen = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            torch.testing.assert_close(compiled(x), layer(x), **EXACT)
            got = torch.autograd.grad(compiled(x).square().sum(), layer.w1)[0]
            want = torch.autograd.grad(layer(x).square().sum(), layer.w1)[0]
            torch.testing.assert_close(got, want, **EXACT)
            seen.append(layer.routes(x))
            advance(layer)
    assert not torch.equal(seen[0], seen[1]) or not torch.equal(seen[1], seen[2])


def test_compiled_with_drawn_offsets():
    """In the graph too each call draws: no value of the first call is kept."""
    torch._dynamo.reset()
    layer = StochasticExperts(D, H, E, **DOUBLE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = batch(50)
    torch.manual_seed(1)
    want = [layer(x), layer(x)]
    torch.manual_seed(1)
    assert all(torch.equal(compiled(x), one) for one in want)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("level", LEVELS)
def test_no_tokens(shape, level):
    layer = StochasticExperts(D, H, E, level, offset=0, **DOUBLE)
    if level == "sequence" and len(shape) == 1:
        shape = (0, 1)
    x = batch(*shape).requires_grad_()
    for mode in ("random", "average", "fixed"):
        layer.inference = mode
        for training in (True, False):
            y = layer.train(training)(x)
            assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.w1.grad.count_nonzero() == 0


# --------------------------------------------------------------------------------------------
# Weights of the published code


def published(prefix=""):
    state = {}
    for i in range(E):
        for name, shape in (("fc1", (H, D)), ("fc2", (D, H))):
            state[f"{prefix}{name}.{i}.weight"] = torch.randn(shape)
            state[f"{prefix}{name}.{i}.bias"] = torch.randn(shape[0])
    return state


@pytest.mark.parametrize("prefix", ["", "encoder.layers.0."])
def test_load_thor_state_dict(prefix):
    layer, state = StochasticExperts(D, H, E), published(prefix)
    layer.load_thor_state_dict({**state, "encoder.layers.1.fc1.0.weight": torch.zeros(1)}, prefix)
    for i, e in itertools.product(range(E), ("fc1", "fc2")):
        weight, bias = (layer.w1, layer.b1) if e == "fc1" else (layer.w2, layer.b2)
        assert torch.equal(weight[i], state[f"{prefix}{e}.{i}.weight"])
        assert torch.equal(bias[i], state[f"{prefix}{e}.{i}.bias"])


def test_load_thor_state_dict_refuses():
    layer, state = StochasticExperts(D, H, E), published()
    missing = {key: value for key, value in state.items() if key != "fc1.2.bias"}
    with pytest.raises(ValueError, match=r"missing: \['fc1.2.bias'\], left over: \[\]"):
        layer.load_thor_state_dict(missing)
    with pytest.raises(ValueError, match=r"left over: .*'fc1.3.weight'"):
        StochasticExperts(D, H, 3).load_thor_state_dict(state)
    with pytest.raises(ValueError, match=r"state\['fc2.1.weight'\]: expected \(6, 10\), got"):
        layer.load_thor_state_dict({**state, "fc2.1.weight": torch.zeros(10, 6)})
    with pytest.raises(ValueError, match="biases and no gate"):
        StochasticExperts(D, H, E, gated=True).load_thor_state_dict(state)


# --------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d": 0}, ValueError, "d: expected 1 <= d"),
        ({"hidden": 2.5}, TypeError, "hidden: expected an int, got float"),
        ({"E": 0}, ValueError, "E: expected 1 <= E"),
        (
            {"level": "word"},
            ValueError,
            "level: expected one of token, sequence, batch, got 'word'",
        ),
        ({"inference": "mean"}, ValueError, "inference: expected one of random, average, fixed"),
        ({"balanced": 1}, TypeError, "balanced: expected a bool, got int"),
        ({"balanced": True, "level": "batch"}, ValueError, "balanced: expected level"),
        ({"distinct_passes": True, "E": 1}, ValueError, "distinct_passes: expected E >= 2"),
        ({"num_passes": 3}, ValueError, "num_passes: expected 1 <= num_passes <= 2, got 3"),
        ({"fixed_expert": 4}, ValueError, "fixed_expert: expected 0 <= fixed_expert <= 3, got 4"),
        ({"offset": 2**63}, ValueError, "offset: expected"),
        ({"activation": "swish"}, ValueError, "activation: expected one of relu, .* got 'swish'"),
        ({"activation": 3}, TypeError, "activation: expected a name or a function, got int"),
        ({"dropout": 1.0}, ValueError, "dropout: expected 0 <= dropout < 1, got 1.0"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        StochasticExperts(**{"d": D, "hidden": H, "E": E, **options})


@pytest.mark.parametrize(
    ("level", "shape", "call", "error", "message"),
    [
        ("token", (3, 7), {}, ValueError, r"x: expected \(..., 6\), got \(3, 7\)"),
        ("token", (3, 6), {"pass_id": 2}, ValueError, "pass_id: expected 0 <= pass_id <= 1"),
        ("token", (3, 6), {"seq_ids": torch.zeros(3)}, ValueError, 'None for level "token"'),
        ("sequence", (3, 6), {}, ValueError, "expected axis 0 to count sequences"),
        ("sequence", (3, 2, 6), {"seq_ids": [0]}, TypeError, "seq_ids: expected a torch.Tensor"),
        ("sequence", (3, 6), {"seq_ids": torch.zeros(3)}, TypeError, "expected int32 or int64"),
        ("sequence", (3, 6), {"seq_ids": torch.zeros(2).int()}, ValueError, r"expected \(3,\) on"),
        ("token", (3, 6), {"offset": 1.5}, TypeError, "offset: expected an int or a 0-d int64"),
        ("token", (3, 6), {"offset": torch.zeros(1)}, ValueError, "offset: expected an int or a"),
    ],
    ids=str,
)
def test_bad_calls(level, shape, call, error, message):
    with pytest.raises(error, match=message):
        StochasticExperts(D, H, E, level)(torch.zeros(shape), **call)


def test_more_bad_calls():
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        StochasticExperts(D, H, E)([0.0] * D)
    balanced = StochasticExperts(D, H, E, "sequence", balanced=True)
    with pytest.raises(ValueError, match="num_seqs: expected how many"):
        balanced(torch.zeros(3, D), seq_ids=torch.zeros(3).int())
    doubled = StochasticExperts(D, H, E, "batch", num_passes=2)
    with pytest.raises(ValueError, match=r"expected 2 passes of one length along axis 0, got \(3,"):
        doubled(torch.zeros(3, 2, D))
    with pytest.raises(ValueError, match="pass_id: expected 0 <= pass_id <= 0"):
        doubled(torch.zeros(4, 2, D), pass_id=1)
    late = StochasticExperts(D, H, E, "sequence", batch_dim=1)
    with pytest.raises(ValueError, match="expected axis 1 to count sequences"):
        late(torch.zeros(4, D))
