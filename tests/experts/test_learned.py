"""TopKExperts, SwitchExperts: learned routes, capacity, the routers' losses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from dashpot.experts import (
    SwitchExperts,
    TopKExperts,
    auxiliary_loss,
    load_balancing_loss,
    router_z_loss,
    topk_gate,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

D, H, E = 6, 10, 4
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("normalize", [False, True])
def test_top_k(k, normalize, by_hand):
    layer = TopKExperts(D, H, E, k, normalize=normalize, **DOUBLE)
    x = batch(3, 5)
    p, ids = layer.router(x).softmax(-1).topk(k)
    p = p / p.sum(-1, keepdim=True) if normalize else p
    want = sum(p[..., j, None] * by_hand(layer, x, ids[..., j]) for j in range(k))
    torch.testing.assert_close(layer(x), want, **EXACT)
    inputs = list(layer.parameters())
    grad = torch.randn_like(want)
    got = torch.autograd.grad(layer(x), inputs, grad)
    torch.testing.assert_close(got, torch.autograd.grad(want, inputs, grad), **EXACT)


@pytest.mark.parametrize("priority", ["choice", "token", "score"])
def test_capacity(priority, by_hand):
    """Beyond it a choice counts as 0, not as the token itself."""
    layer = TopKExperts(D, H, E, 2, capacity_factor=0.5, priority=priority, **DOUBLE)
    x = batch(16)
    assert layer.capacity(16) == 4 and layer.capacity(17) == 5
    ids, p = topk_gate(layer.router(x), 2)
    order = {
        "choice": sorted(itertools.product(range(16), range(2)), key=lambda tj: (tj[1], tj[0])),
        "token": list(itertools.product(range(16), range(2))),
        "score": sorted(itertools.product(range(16), range(2)), key=lambda tj: -p[tj].item()),
    }[priority]
    kept, room = torch.zeros_like(p), [4] * E
    for t, j in order:
        kept[t, j] = room[ids[t, j]] > 0
        room[ids[t, j]] -= 1
    assert 0 < kept.sum() < 32
    want = sum((kept * p)[:, j, None] * by_hand(layer, x, ids[:, j]) for j in range(2))
    torch.testing.assert_close(layer(x), want, **EXACT)
    layer.capacity_factor = 0.0
    assert layer(x).count_nonzero() == 0


def test_switch_is_one_choice_with_capacity():
    layer = SwitchExperts(D, H, E, **DOUBLE)
    assert (layer.k, layer.capacity_factor, layer.capacity(16)) == (1, 1.25, 5)
    other = TopKExperts(D, H, E, 1, capacity_factor=1.25, **DOUBLE)
    other.load_state_dict(layer.state_dict())
    x = batch(16)
    assert torch.equal(layer(x), other(x))


def test_auxiliary_loss():
    model = nn.Sequential(TopKExperts(D, H, E, 2), nn.Sequential(SwitchExperts(D, H, E)))
    x = torch.randn(3, 5, D)
    y = model[0](x)
    model[1](y)
    want = 0
    for layer, rows in ((model[0], x), (model[1][0], y)):
        logits = layer.router(rows.view(-1, D))
        ids, _ = topk_gate(logits, layer.k)
        want = want + 1e-2 * load_balancing_loss(logits, ids) + 1e-3 * router_z_loss(logits)
    got = auxiliary_loss(model)
    torch.testing.assert_close(got, want)
    got.backward()
    assert all(m.router.weight.grad.any() for m in (model[0], model[1][0]))


def test_auxiliary_loss_is_taken_once():
    layer, x = TopKExperts(D, H, E), torch.randn(5, D)
    layer(x)
    auxiliary_loss(layer)
    with pytest.raises(RuntimeError, match="not called in training mode"):
        auxiliary_loss(layer)
    layer.eval()(x)
    with pytest.raises(RuntimeError, match="not called in training mode"):
        auxiliary_loss(layer)
    with pytest.raises(ValueError, match="holds TopKExperts, got none"):
        auxiliary_loss(nn.Linear(2, 2))


def test_auxiliary_loss_under_checkpointing():
    """Without re-entry its gradient is the plain one; with re-entry it is refused."""
    layer = TopKExperts(D, H, E, **DOUBLE)
    x = batch(9).requires_grad_()
    layer(x)
    (want,) = torch.autograd.grad(auxiliary_loss(layer), layer.router.weight)
    checkpoint(layer, x, use_reentrant=False)
    (got,) = torch.autograd.grad(auxiliary_loss(layer), layer.router.weight)
    assert torch.equal(got, want) and want.any()
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="needs use_reentrant=False"):
        auxiliary_loss(layer)


def test_routes_of_a_learned_router_are_float32_under_autocast():
    """A logit rounded to bfloat16 would send tokens elsewhere."""
    layer, x = TopKExperts(D, H, 64, 1), torch.randn(500, D)
    with torch.autocast("cpu", torch.bfloat16):
        logits = layer._logits(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, layer.router(x))


def test_a_layer_can_be_copied_after_a_call():
    layer, x = TopKExperts(D, H, E), torch.randn(5, D)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert auxiliary_loss(layer).requires_grad


def test_losses_of_no_tokens():
    layer = TopKExperts(D, H, E)
    assert layer(torch.zeros(0, D)).shape == (0, D)
    assert auxiliary_loss(layer) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 5}, ValueError, "k: expected 1 <= k <= 4, got 5"),
        ({"capacity_factor": -1.0}, ValueError, "capacity_factor: expected a number >= 0"),
        ({"priority": "first"}, ValueError, "priority: expected one of choice, token, score"),
        ({"normalize": None}, TypeError, "normalize: expected a bool"),
    ],
    ids=str,
)
def test_bad_options_of_learned_routes(options, error, message):
    with pytest.raises(error, match=message):
        TopKExperts(D, H, E, **options)
