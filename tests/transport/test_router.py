"""SparseOTRouter: the official defaults, capacity, the dispatch plan, gradients to the gate."""

from __future__ import annotations

import pytest
import torch
from dashpot.experts import dispatch_plan, expert_mlp, permute, unpermute
from dashpot.transport import SparseOTRouter, regularized_ot
from torch import nn

E, D, H = 8, 6, 10


def logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, E, generator=generator, dtype=torch.float64).to(dtype)


def chosen(routes):
    """(T, E) bool: who goes where, read off the plan's slots alone."""
    tokens, k = routes.plan.rank.shape
    table = torch.zeros(tokens, E, dtype=torch.bool)
    start = 0
    for expert, (count, stop) in enumerate(
        zip(routes.plan.counts.tolist(), routes.plan.offsets.tolist(), strict=True)
    ):
        rows = routes.plan.order[start : start + count]
        assert bool((rows >= 0).all()) and bool((rows.diff() > 0).all())
        assert bool((routes.plan.order[start + count : stop] == -1).all())
        for slot, flat in enumerate(rows.tolist()):
            assert routes.plan.rank[flat // k, flat % k] == start + slot
            assert routes.expert_idx[flat // k, flat % k] == expert
            table[flat // k, expert] = True
        start = stop
    assert int((routes.plan.rank >= 0).sum()) == int(table.sum())
    return table


ROUTERS = {
    "experts choose": {"capacity_factor": 1.1},
    "tokens choose": {"num_selected": 2},
    "experts choose, sinkhorn": {
        "capacity_factor": 1.0, "reg": "negentropy", "solver": "sinkhorn",
    },
    "tokens choose, sinkhorn": {"num_selected": 1, "reg": "negentropy", "solver": "sinkhorn"},
    "experts choose, l2": {"capacity_factor": 1.0, "reg": "l2"},
    "tokens choose, l2": {"num_selected": 2, "reg": "l2"},
}  # fmt: skip


@pytest.fixture(params=ROUTERS)
def router(request):
    return SparseOTRouter(E, **ROUTERS[request.param])


def test_the_official_problem_experts_choose():
    """cost -softmax, a token 1, an expert T / E, k the capacity, 20 steps of Adam from 0."""
    x = logits(100)
    router = SparseOTRouter(E, capacity_factor=1.1)
    assert router.capacity(100) == 16 and router.capacity(1) == 1 and router.capacity(1024) == 144
    result = regularized_ot(
        -x.softmax(-1), torch.ones(100, dtype=x.dtype),
        torch.full((E,), 100 / E, dtype=x.dtype), max_nz=16, gamma=1.0, solver="adam",
        max_iter=20, plan="dense", tol=0.0, lr=1e-2,
    )  # fmt: skip
    routes = router(x)
    assert torch.equal(chosen(routes), result.plan > 0)
    assert torch.equal(routes.weights, x.softmax(-1))
    assert routes.result.n_iter.tolist() == [20]
    assert routes.result.value.item() == pytest.approx(result.value.item())


def test_the_official_problem_tokens_choose():
    x = logits(100)
    result = regularized_ot(
        -x.softmax(-1).mT.contiguous(), torch.full((E,), 100 / E, dtype=x.dtype),
        torch.ones(100, dtype=x.dtype), max_nz=2, gamma=1.0, solver="adam", max_iter=20,
        plan="dense", tol=0.0, lr=1e-2,
    )  # fmt: skip
    routes = SparseOTRouter(E, num_selected=2)(x)
    table = chosen(routes)
    assert torch.equal(table, (result.plan > 0).mT)
    assert int(table.sum(1).max()) == 2 and int(table.sum(1).min()) >= 1
    there = routes.expert_idx >= 0
    want = x.softmax(-1).gather(1, routes.expert_idx.clamp(min=0).long())
    assert torch.equal(routes.weights[there], want[there])


def test_experts_are_balanced_where_the_gate_is_not():
    """A gate that prefers two experts: top-2 sends them most tokens, the router spreads them."""
    x = logits(512) + torch.tensor([2.0, 2.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    plain = dispatch_plan(x.topk(1).indices, E).counts
    spread = SparseOTRouter(E, num_selected=1, solver="auto", max_iter=500)(x).plan.counts
    assert plain.max() > 150
    assert spread.max() < 1.3 * 512 / E
    took = SparseOTRouter(E, capacity_factor=1.0)(x).plan.counts
    assert took.max() <= 64


def test_any_router_keeps_its_bounds(router):
    table = chosen(router(logits(96)))
    assert table.any()
    if router.num_selected is None:
        assert int(table.sum(0).max()) <= router.capacity(96)
    else:
        assert int(table.sum(1).max()) <= router.num_selected


def test_groups_are_balanced_by_themselves(router):
    """(2, 3, T, E) is six problems; an expert's segment holds its rows of all of them."""
    x = logits(2, 3, 24)
    table = chosen(router(x))
    want = torch.cat([chosen(router(group)) for group in x.reshape(6, 24, E)])
    assert torch.equal(table, want)
    assert router(x).result.n_iter.shape == (6,)


class Layer(nn.Module):
    """A gate, the router, experts: what a user would write."""

    def __init__(self, router):
        super().__init__()
        self.gate, self.router = nn.Linear(D, E, bias=False), router
        self.w1, self.w2 = (nn.Parameter(torch.randn(E, *shape)) for shape in ((H, D), (D, H)))

    def forward(self, x):
        routes = self.router(self.gate(x))
        return expert_mlp(x, routes.plan, self.w1, None, self.w2, None, weights=routes.weights)


def test_an_expert_layer(router):
    """Outputs and gradients, the gate's too, against a loop over experts."""
    layer = Layer(router).double()
    x = torch.randn(40, D, dtype=torch.float64)
    table = chosen(router(layer.gate(x)))
    p = layer.gate(x).softmax(-1)
    each = torch.stack(
        [(x @ w1.mT).relu() @ w2.mT for w1, w2 in zip(layer.w1, layer.w2, strict=True)], dim=1
    )
    want = (torch.where(table, p, 0)[..., None] * each).sum(1)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    got = torch.autograd.grad(layer(x), list(layer.parameters()), weight)
    expected = torch.autograd.grad(want, list(layer.parameters()), weight)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert got[-1].any() and all(grad.any() for grad in got)


def test_rows_there_and_back(router):
    """permute and unpermute take the plan: a token returns once for each expert that took it."""
    x = torch.randn(40, D)
    routes = router(logits(40, dtype=torch.float32))
    back = unpermute(permute(x, routes.plan), routes.plan)
    torch.testing.assert_close(back, x * chosen(routes).sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gate_is_read_in_float32(router, dtype):
    x = logits(40, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routes = router(x)
    assert routes.weights.dtype == torch.float32
    assert torch.equal(chosen(routes), chosen(router(x.float())))


def test_it_trains():
    """Ten steps towards a target lower the loss: the gate learns through softmax alone."""
    torch.manual_seed(0)
    layer = Layer(SparseOTRouter(E, capacity_factor=1.0))
    x, target = torch.randn(64, D), torch.randn(64, D)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-2)
    before = layer.gate.weight.detach().clone()
    losses = []
    for _ in range(10):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(layer.gate.weight, before)


def test_errors():
    with pytest.raises(ValueError, match=r"expected one of them.*got None and None"):
        SparseOTRouter(E)
    with pytest.raises(ValueError, match=r"expected one of them.*got 1.0 and 2"):
        SparseOTRouter(E, capacity_factor=1.0, num_selected=2)
    with pytest.raises(ValueError, match="num_selected: expected 1 <= num_selected <= 8, got 9"):
        SparseOTRouter(E, num_selected=9)
    with pytest.raises(ValueError, match=r"capacity_factor: expected a positive.*got 0"):
        SparseOTRouter(E, capacity_factor=0)
    with pytest.raises(ValueError, match=r"solver: expected one of auto.*got 'sgd'"):
        SparseOTRouter(E, num_selected=1, solver="sgd")
    with pytest.raises(ValueError, match=r"lr: expected a positive.*got 0"):
        SparseOTRouter(E, num_selected=1, lr=0)
    router = SparseOTRouter(E, num_selected=1)
    with pytest.raises(ValueError, match=r"logits: expected \(\.\.\., T, 8\), got \(3, 7\)"):
        router(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"logits: expected at least one token.*got \(0, 8\)"):
        router(torch.zeros(0, 8))
    assert "num_selected=1" in repr(router)
