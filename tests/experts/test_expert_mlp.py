"""expert_mlp: each token through its own experts, and only those."""

from __future__ import annotations

import sys

import dashpot
import pytest
import torch
from dashpot.experts.expert_mlp import EXPERT_MLP
from torch.nn import functional

expert_mlp_file = sys.modules["dashpot.experts.expert_mlp"]  # its name is the function's


def layers(experts=4, d=6, h=9, gated=False, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    rows = 2 * h if gated else h
    shapes = ((experts, rows, d), (experts, rows), (experts, d, h), (experts, d))
    return [torch.randn(*s, generator=generator).mul(0.5).to(device, dtype) for s in shapes]


def by_token(x, ids, w1, b1, w2, b2, weights, activation="relu", gated=False):
    """A loop over tokens and choices."""
    rows = []
    for t, chosen in enumerate(ids.tolist()):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(chosen):
            if not 0 <= e < len(w1):
                continue
            z = w1[e] @ x[t] + b1[e]
            if gated:
                gate, up = z.chunk(2)
                a = getattr(functional, activation)(gate) * up
            else:
                a = getattr(functional, activation)(z)
            w = weights[t, j] if weights is not None else 1 / ids.shape[1]
            total = total + w * (w2[e] @ a + b2[e])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_by_token(backend, spec_ids, activation, gated, weighted):
    """Values and all gradients, some choices not routed."""
    device = backend.device
    ids = spec_ids.clone()
    ids[3, 1] = -1
    x = torch.randn(6, 6, device=device)
    tensors = [x, *layers(gated=gated, device=device)]
    if weighted:
        tensors.append(torch.rand(6, 2, device=device))
    tensors = [tensor.requires_grad_() for tensor in tensors]
    weights = tensors[5] if weighted else None
    options = {"activation": activation, "gated": gated}
    with dashpot.backend(backend.and_others):
        got = dashpot.expert_mlp(
            tensors[0], ids.to(device), *tensors[1:5], weights=weights, **options
        )
        grads = torch.autograd.grad(got.square().sum(), tensors)
    want = by_token(tensors[0], ids, *tensors[1:5], weights, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads, torch.autograd.grad(want.square().sum(), tensors), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("experts", "ids"), [
    (4, [[2]] * 40),  # all tokens on one expert
    (1, [[0]] * 7),
    (3, [[1, 0, 2], [2, 1, 0], [0, 1, 2]]),  # k = E
    (2, [[-1, -1], [0, -1], [7, 1]]),  # not routed, in part and at all
    (3, [[-1]] * 5),
])  # fmt: skip
def test_one_sided(backend, experts, ids):
    """Values and gradients; inputs and ids with gaps between their rows."""
    device = backend.device
    ids = torch.tensor(ids, dtype=torch.int32, device=device)
    apart = torch.stack([ids, ids - 1], 2)[..., 0]
    x = torch.randn(len(ids), 12, device=device)[:, ::2]
    tensors = [tensor.requires_grad_() for tensor in (x, *layers(experts, device=device))]
    weights = torch.rand(ids.shape, device=device)
    assert not (x.is_contiguous() or apart.is_contiguous())
    with dashpot.backend(backend.and_others):
        got = dashpot.expert_mlp(x, apart, *tensors[1:], weights=weights)
        grads = torch.autograd.grad(got.square().sum(), tensors)
    want = by_token(x, ids, *tensors[1:], weights)
    want = want + 0 * sum(tensor.sum() for tensor in tensors)  # of what no token reaches, zeros
    wanted = torch.autograd.grad(want.square().sum(), tensors)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-4)


def test_one_choice_and_a_plan(backend):
    """Ids, a plan of them, a padded plan: the same function."""
    device = backend.device
    x, parts = torch.randn(40, 6, device=device), layers(device=device)
    with dashpot.backend(backend.and_others):
        ids = dashpot.route_random(40, 4, seed=3, device=device)
        want = dashpot.expert_mlp(x, ids, *parts)
        torch.testing.assert_close(dashpot.expert_mlp(x, ids[:, 0], *parts), want)
        for align in (1, 16):
            plan = dashpot.dispatch_plan(ids, 4, align=align)
            torch.testing.assert_close(dashpot.expert_mlp(x, plan, *parts), want)
    torch.testing.assert_close(want, by_token(x, ids, *parts, None), rtol=1e-5, atol=1e-5)


def test_capacity_drops_to_zero(backend):
    device = backend.device
    x, parts = torch.randn(8, 6, device=device), layers(device=device)
    ids = torch.zeros(8, 1, dtype=torch.int32, device=device)
    with dashpot.backend(backend.and_others):
        y = dashpot.expert_mlp(x, ids, *parts, capacity=3)
        assert y[:3].any() and not y[3:].any()
        assert not dashpot.expert_mlp(x, ids, *parts, capacity=0).any()


def test_official_inference(backend):
    """Every expert on every token, masked and summed, as the published code does it."""
    device = backend.device
    x, parts = torch.randn(30, 6, device=device), layers(device=device)
    w1, b1, w2, b2 = parts
    with dashpot.backend(backend.and_others):
        ids = dashpot.route_random(30, 4, seed=11, device=device)
        got = dashpot.expert_mlp(x, ids, *parts)
    every = torch.stack([torch.relu(x @ w1[e].T + b1[e]) @ w2[e].T + b2[e] for e in range(4)])
    masks = torch.stack([ids == e for e in range(4)])
    torch.testing.assert_close(got, (every * masks).sum(0), rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_without_a_gradient(monkeypatch):
    kept = []
    call = EXPERT_MLP.__call__
    monkeypatch.setattr(
        expert_mlp_file, "EXPERT_MLP", lambda *args: (kept.append(args[-1]), call(*args))[1]
    )
    x, parts = torch.randn(5, 6), layers()
    ids = torch.zeros(5, 1, dtype=torch.int32)
    dashpot.expert_mlp(x, ids, *parts)
    dashpot.expert_mlp(x.requires_grad_(), ids, *parts)
    with torch.no_grad():
        dashpot.expert_mlp(x, ids, *parts)
    assert kept == [False, True, False]


def test_an_expert_without_tokens_gets_zeros(backend):
    """Not None, as the published code's separate layers: see the docstring."""
    parts = [part.requires_grad_() for part in layers(device=backend.device)]
    x = torch.randn(5, 6, device=backend.device)
    ids = torch.zeros(5, 1, dtype=torch.int32, device=backend.device)
    with dashpot.backend(backend.and_others):
        dashpot.expert_mlp(x, ids, *parts).sum().backward()
    assert all(not part.grad[1:].any() and part.grad[0].any() for part in parts)


def test_same_seed_again_for_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, parts = torch.randn(20, 6, requires_grad=True), layers()

    def layer(x):
        return dashpot.expert_mlp(x, dashpot.route_random(20, 4, seed=5, offset=2), *parts)

    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    (got,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(got, want)


def test_compiled_in_one_graph():
    parts = layers()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(x, offset):
        return dashpot.expert_mlp(x, dashpot.route_random(20, 4, seed=5, offset=offset), *parts)

    torch._dynamo.reset()
    x = torch.randn(20, 6)
    for step in range(2):
        want = dashpot.expert_mlp(x, dashpot.route_random(20, 4, seed=5, offset=step), *parts)
        torch.testing.assert_close(layer(x, torch.tensor(step)), want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"x": torch.ones(5, 7)}, ValueError, r"x: expected \(T, 6\) as w1 has it, got \(5, 7\)"),
     ({"x": torch.ones(5, 6).bfloat16()}, TypeError, "w1: expected torch.bfloat16, got torch.fl"),
     ({"w2": torch.ones(4, 6, 8)}, ValueError, r"w2: expected \(4, 6, 9\), got \(4, 6, 8\)"),
     ({"b1": torch.ones(4, 8)}, ValueError, r"b1: expected \(4, 9\), got \(4, 8\)"),
     ({"gated": True}, ValueError, r"w1: expected \(E, 2h, d\), E >= 1, got \(4, 9, 6\)"),
     ({"gated": 1}, TypeError, "gated: expected a bool, got int"),
     ({"activation": "tanh"}, ValueError, "activation: expected one of relu, gelu, silu"),
     ({"expert_idx": torch.zeros(4, 1).int()}, ValueError, "expert_idx: expected 5 tokens, got 4"),
     ({"weights": torch.ones(5, 2)}, ValueError, r"weights: expected \(5, 1\), got \(5, 2\)"),
     ({"expert_idx": "plan", "capacity": 3}, ValueError, "expert_idx: expected ids where capacity"),
     ({"expert_idx": "wide plan"}, ValueError, "expert_idx: expected a plan of 4 experts, got 5")],
)  # fmt: skip
def test_errors(change, error, message):
    w1, b1, w2, b2 = layers()
    ids = torch.zeros(5, 1, dtype=torch.int32)
    kwargs = {"x": torch.ones(5, 6), "expert_idx": ids, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    kwargs |= change
    if isinstance(kwargs["expert_idx"], str):
        experts = 5 if kwargs["expert_idx"].startswith("wide") else 4
        kwargs["expert_idx"] = dashpot.dispatch_plan(ids, experts)
    with pytest.raises(error, match=message):
        dashpot.expert_mlp(**kwargs)
