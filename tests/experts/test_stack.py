"""What all layers of experts share: the stacked networks, dtypes, inputs of every kind."""

from __future__ import annotations

import pytest
import torch
from dashpot.experts import StochasticExperts, SwitchExperts, TopKExperts, advance
from torch import nn

D, H, E = 6, 10, 4
LEVELS = ("token", "sequence", "batch")
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def test_inductor():
    torch._dynamo.reset()
    x = torch.randn(3, 5, D)
    layer = StochasticExperts(D, H, E, offset=1, gated=True, dropout=0.1)
    model = torch.compile(nn.Sequential(layer, TopKExperts(D, H, E)), fullgraph=True)
    model.eval()
    torch.testing.assert_close(model(x), model._orig_mod(x))
    model.train()
    y = model(x)
    assert y.shape == x.shape and model._orig_mod[1].aux_loss.requires_grad
    drawn = torch.compile(StochasticExperts(D, H, E), fullgraph=True)
    assert not torch.equal(drawn(x), drawn(x))


@pytest.mark.parametrize("make", [StochasticExperts, TopKExperts, SwitchExperts])
def test_autocast(make):
    """bfloat16 x and float32 weights: products in bfloat16 as torch.nn.Linear's, gradients in
    float32."""
    layer = make(D, H, E)
    options = {"offset": 0} if make is StochasticExperts else {}
    x = torch.randn(3, 5, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y, from_float = layer(x, **options), layer(x.float(), **options)
    assert y.dtype == from_float.dtype == torch.bfloat16
    assert torch.equal(y, from_float)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())
    torch.testing.assert_close(y.float(), layer(x.float(), **options), rtol=0.05, atol=0.05)
    with pytest.raises(
        TypeError, match=r"x: expected torch.float32 as the weights .* got .*float16"
    ):
        layer(x, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    layer = StochasticExperts(D, H, E, offset=0)
    x = torch.randn(3, 5, D)
    want = layer(x)
    got = layer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", [StochasticExperts, TopKExperts, SwitchExperts])
def test_strides(make):
    options = {"offset": 0} if make is StochasticExperts else {}
    layer, x = make(D, H, E, **options, **DOUBLE), batch(3, 5)
    want = layer(x)
    for other in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([x, x], -1).flatten(-2)[..., ::2],
        x.movedim(-1, 0).contiguous().movedim(0, -1),
    ):
        assert not other.is_contiguous()
        torch.testing.assert_close(layer(other), want, **EXACT)


def test_one_expert_is_a_plain_network(one_expert):
    x = batch(3, 5)
    for level in LEVELS:
        layer = StochasticExperts(D, H, 1, level, **DOUBLE)
        torch.testing.assert_close(layer(x), one_expert(layer, 0, x), **EXACT)
    layer = TopKExperts(D, H, 1, 1, **DOUBLE)
    torch.testing.assert_close(layer(x), one_expert(layer, 0, x), **EXACT)


def test_dropout_on_the_hidden_units():
    layer = StochasticExperts(D, 200, 2, activation="identity", dropout=0.25, bias=False, **DOUBLE)
    with torch.no_grad():
        layer.w1.fill_(1 / D)
        layer.w2.fill_(1 / 200)
    x = torch.ones(50, D, dtype=torch.float64)
    kept = layer(x) * 0.75  # the share of hidden units that were kept, of each token
    assert abs(kept.mean() - 0.75) < 0.02 and kept[:, 0].unique().numel() > 5
    torch.testing.assert_close(layer.eval()(x), torch.ones_like(x), **EXACT)


def test_initial_weights_are_those_of_linear_layers():
    layer = StochasticExperts(D, 4000, E)
    for weight, fan in ((layer.w1, D), (layer.b1, D), (layer.w2, 4000), (layer.b2, 4000)):
        assert 0.9 * fan**-0.5 < weight.abs().max() <= fan**-0.5
        assert weight[0].ne(weight[1]).any()


def test_repr():
    text = repr(StochasticExperts(D, H, E, "batch", balanced=False, num_passes=2, gated=True))
    assert "6, 10, E=4, activation=relu, gated=True, level=batch" in text and "num_passes=2" in text
    assert "k=2, capacity_factor=1.5" in repr(TopKExperts(D, H, E, capacity_factor=1.5))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "options",
    [{}, {"gated": True, "activation": "silu"}, {"bias": False, "activation": "gelu"},
     {"activation": "gelu_tanh"}, {"activation": torch.sin, "gated": True}],
    ids=["plain", "gated", "unbiased", "unfused", "function"],
)  # fmt: skip
def test_a_token_goes_through_its_expert(level, options, by_hand):
    """By the fused op and, for activations it does not have, by its parts; with gradients."""
    layer = StochasticExperts(D, H, E, level, offset=3, **options, **DOUBLE)
    x = batch(3, 5).requires_grad_()
    inputs = [x, *layer.parameters()]
    y, want = layer(x), by_hand(layer, x, layer.routes(x))
    assert want.any()
    torch.testing.assert_close(y, want, **EXACT)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, grad)
    want = torch.autograd.grad(want, inputs, grad)
    torch.testing.assert_close(got, want, **EXACT)


def test_gradient_of_an_unused_expert_is_zero():
    layer = StochasticExperts(D, H, E, "batch", offset=0, **DOUBLE)
    x = batch(3, 5)
    layer(x).sum().backward()
    used = layer.routes(x)[0].item()
    for p in layer.parameters():
        assert p.grad[used].any() and not p.grad[torch.arange(E) != used].any()


# --------------------------------------------------------------------------------------------
# On a GPU (`make gpu`): no wait for the device, and a captured graph that advances the counter

if torch.cuda.is_available():

    @pytest.mark.parametrize("level", LEVELS)
    def test_no_host_synchronisation(level):
        x = torch.randn(8, 5, D, device="cuda")
        layers = [
            StochasticExperts(D, H, E, level, device="cuda"),
            StochasticExperts(D, H, E, level, offset=0, distinct_passes=True, device="cuda"),
            TopKExperts(D, H, E, device="cuda"),
            SwitchExperts(D, H, E, device="cuda"),
        ]
        for layer in layers:
            layer(x).sum().backward()  # compiles, loads
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layer in layers:
                layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("level", LEVELS)
    def test_a_captured_graph_advances_the_counter(level):
        layer = StochasticExperts(D, H, E, level, offset=0, device="cuda")
        x = torch.randn(8, 5, D, device="cuda")
        with torch.no_grad():
            layer(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
                advance(layer)
            seen = set()
            for step in range(8):
                want = layer(x, offset=2 * step)
                graph.replay()
                assert torch.equal(y, want) and layer.offset == 2 * (step + 1)
                seen.add(tuple(layer.routes(x, offset=2 * step).flatten().tolist()))
        assert len(seen) > 1
