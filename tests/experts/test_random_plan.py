"""random_plan: the plan of route_random, bit for bit, without the ids."""

from __future__ import annotations

import dashpot
import pytest
import torch


@pytest.mark.parametrize("kwargs", [
    {"top_k": 1}, {"top_k": 2, "num_passes": 2}, {"top_k": 3, "replace": True, "align": 8},
    {"top_k": 2, "capacity": 300}, {"top_k": 4, "capacity": 200, "priority": "token"},
    {"top_k": 2, "capacity": 0}, {"top_k": 12, "capacity": 100},
])  # fmt: skip
def test_is_the_plan_of_the_routes(backend, kwargs):
    """Of the reference, whatever the backend; 12 choices are more than a kernel may draw again."""
    routing = {name: kwargs[name] for name in ("top_k", "replace", "num_passes") if name in kwargs}
    planning = {name: value for name, value in kwargs.items() if name not in routing}
    with dashpot.backend(backend.and_others):
        plan = dashpot.random_plan(1300, 13, seed=77, offset=5, device=backend.device, **kwargs)
    with dashpot.backend("reference"):
        ids = dashpot.route_random(1300, 13, seed=77, offset=5, **routing)
        want = dashpot.dispatch_plan(ids, 13, **planning)
    for got, part in zip(plan, want, strict=True):
        assert torch.equal(got.cpu(), part)


def test_offset_advances_in_place(backend):
    offset = torch.tensor(5, device=backend.device)
    seed = torch.tensor(77, device=backend.device)
    first = dashpot.random_plan(100, 3, seed=seed, offset=offset)
    offset += 1
    second = dashpot.random_plan(100, 3, seed=seed, offset=offset)
    want = dashpot.random_plan(100, 3, seed=77, offset=6, device=backend.device)
    assert torch.equal(second.rank, want.rank) and not torch.equal(first.rank, want.rank)


def test_no_unit(backend):
    plan = dashpot.random_plan(0, 3, seed=1, align=4, device=backend.device)
    assert plan.rank.shape == (0, 1) and plan.order.tolist() == [-1] * 12


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"priority": "score"}, ValueError, "priority: expected one of choice, token"),
     ({"capacity": -2}, ValueError, "capacity: expected 0 <= capacity"),
     ({"top_k": 4}, ValueError, "top_k: expected at most num_experts = 3"),
     ({"seed": None}, TypeError, "seed: expected an int or a 0-d int64 tensor")],
)  # fmt: skip
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        dashpot.random_plan(**{"num_units": 4, "num_experts": 3, "seed": 0, **change})
