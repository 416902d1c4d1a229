"""dispatch_plan: a stable counting sort with capacity and padding."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

V2 = {
    "all": ({}, [5, 8, 12, 12], [1, 2, 6, 8, 11, 3, 5, 9, 0, 4, 7, 10],
            [[8, 0], [1, 5], [9, 6], [2, 10], [3, 7], [11, 4]]),
    "choice": ({"capacity": 3}, [3, 6, 9, 9], [2, 6, 8, 3, 5, 9, 0, 4, 10],
               [[6, -1], [0, 3], [7, 4], [1, -1], [2, 5], [8, -1]]),
    "token": ({"capacity": 3, "priority": "token"}, [3, 6, 9, 9], [1, 2, 6, 3, 5, 9, 0, 4, 7],
              None),
    "align": ({"align": 4}, [8, 12, 16, 16],
              [1, 2, 6, 8, 11, -1, -1, -1, 3, 5, 9, -1, 0, 4, 7, 10], None),
}  # fmt: skip


@pytest.mark.parametrize("which", V2)
def test_vectors(backend, spec_ids, which):
    kwargs, offsets, order, rank = V2[which]
    plan = dashpot.dispatch_plan(spec_ids.to(backend.device), 4, **kwargs)
    assert plan.offsets.tolist() == offsets
    assert plan.order.tolist() == order + [-1] * (plan.order.numel() - len(order))
    assert plan.order.numel() == (24 if which == "align" else 12)
    assert rank is None or plan.rank.tolist() == rank
    assert plan.routed.tolist() == [5, 3, 4, 0]
    assert all(part.dtype == torch.int32 for part in plan)


def by_hand(ids, experts, capacity, priority, scores, align):
    """The plan by Python lists."""
    tokens, k = ids.shape
    flat = ids.flatten().tolist()
    visits = list(range(tokens * k))
    if priority == "choice":
        visits.sort(key=lambda i: i % k)
    if priority == "score":
        value = [-torch.inf if s != s else s for s in scores.flatten().tolist()]
        visits.sort(key=lambda i: -value[i])
    segments = []
    for e in range(experts):
        mine = [i for i in visits if flat[i] == e]
        segments.append(sorted(mine if capacity is None else mine[:capacity]))
    order, ends = [], []
    for rows in segments:
        order += rows + [-1] * (-len(rows) % align)
        ends.append(len(order))
    routed = [flat.count(e) for e in range(experts)]
    return [len(rows) for rows in segments], routed, ends, order


@given(
    tokens=st.integers(0, 70), k=st.integers(1, 4), experts=st.integers(1, 9),
    capacity=st.none() | st.integers(0, 30), align=st.sampled_from([1, 2, 8]),
    priority=st.sampled_from(["choice", "token", "score"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_by_hand(backend, tokens, k, experts, capacity, align, priority, seed):
    """Every field, against lists; a bijection between kept choices and slots."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, k), generator=generator).int()
    scores = torch.randint(0, 5, (tokens, k), generator=generator).float()
    scores[scores == 4] = torch.nan
    given_scores = scores if priority == "score" else None
    device = backend.device
    with dashpot.backend(backend.and_others):
        plan = dashpot.dispatch_plan(
            ids.to(device), experts, capacity=capacity, priority=priority, align=align,
            scores=None if given_scores is None else given_scores.to(device),
        )  # fmt: skip
    counts, routed, ends, order = by_hand(ids, experts, capacity, priority, scores, align)
    assert plan.counts.tolist() == counts and plan.routed.tolist() == routed
    assert plan.offsets.tolist() == ends
    assert plan.order.tolist() == order + [-1] * (plan.order.numel() - len(order))
    rank, slots = plan.rank.flatten().cpu(), plan.order.cpu()
    kept = (rank >= 0).nonzero().flatten()
    assert torch.equal(slots[rank[kept].long()].long(), kept)
    assert len(kept) == sum(counts)


@pytest.mark.parametrize(("tokens", "k"), [(20_011, 1), (9011, 2)])
def test_same_bits_as_the_reference(backend, tokens, k):
    """Several blocks of every kernel, more experts than lanes."""
    ids = torch.randint(-1, 100, (tokens, k)).int()
    for kwargs in ({}, {"capacity": 150}, {"capacity": 90, "priority": "token", "align": 16}):
        plan = dashpot.dispatch_plan(ids.to(backend.device), 100, **kwargs)
        with dashpot.backend("reference"):
            want = dashpot.dispatch_plan(ids, 100, **kwargs)
        for got, part in zip(plan, want, strict=True):
            assert torch.equal(got.cpu(), part)


@pytest.mark.parametrize(
    ("ids", "experts"), [([[2]] * 50, 3), ([[0]] * 7, 1), ([[1, 0, 2]] * 9, 3), ([[-1, 7]] * 5, 2)]
)
def test_one_sided(backend, ids, experts):
    """All tokens to one expert; E = 1; k = E; none routed at all."""
    ids = torch.tensor(ids, dtype=torch.int32)
    plan = dashpot.dispatch_plan(ids.to(backend.device), experts)
    counts, routed, ends, order = by_hand(ids, experts, None, "token", None, 1)
    assert plan.counts.tolist() == counts == plan.routed.tolist() == routed
    assert plan.offsets.tolist() == ends
    assert plan.order.tolist() == order + [-1] * (ids.numel() - len(order))


def test_capacity_zero_drops_all_but_counts(backend, spec_ids):
    plan = dashpot.dispatch_plan(spec_ids.to(backend.device), 4, capacity=0, align=8)
    assert plan.routed.tolist() == [5, 3, 4, 0]
    assert plan.counts.tolist() == plan.offsets.tolist() == [0] * 4
    assert (plan.rank == -1).all() and (plan.order == -1).all()


@pytest.mark.parametrize("align", [1, 16])
def test_no_token(backend, align):
    ids = torch.empty((0, 2), dtype=torch.int32, device=backend.device)
    plan = dashpot.dispatch_plan(ids, 5, align=align)
    assert plan.offsets.tolist() == [0] * 5 and plan.rank.shape == (0, 2)
    assert plan.order.tolist() == [-1] * (0 if align == 1 else 80)


def test_forms_of_ids(backend, spec_ids):
    """One column, 64 bits (beyond 32, too), and any strides."""
    ids = spec_ids.to(backend.device)
    want = dashpot.dispatch_plan(ids[:, :1].contiguous(), 4)
    far = ids[:, 0].long()
    for form in (ids[:, 0], ids[:, :1], far):
        assert all(map(torch.equal, dashpot.dispatch_plan(form, 4), want))
    far[0] = 2**32 + 2  # wraps to 2 in 32 bits
    assert dashpot.dispatch_plan(far, 4).rank[0].item() == -1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_other_dtypes(dtype):
    ids = torch.zeros(6, 1, dtype=torch.int32)
    scores = torch.tensor([[1], [3], [2], [3], [-1], [0]], dtype=dtype, requires_grad=True)
    plan = dashpot.dispatch_plan(ids, 1, capacity=3, priority="score", scores=scores)
    assert plan.order.tolist() == [1, 2, 3, -1, -1, -1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"expert_idx": [[1]]}, TypeError, "expert_idx: expected a torch.Tensor, got list"),
        ({"expert_idx": torch.zeros(3, 1)}, TypeError, "expert_idx: expected int32 or int64"),
        ({"expert_idx": torch.zeros(3, 1, 1, dtype=torch.int32)}, ValueError, "expert_idx: expec"),
        ({"expert_idx": torch.zeros(3, 0, dtype=torch.int32)}, ValueError, "k >= 1 choices"),
        ({"num_experts": 0}, ValueError, "num_experts: expected 1 <= num_experts"),
        ({"capacity": -1}, ValueError, "capacity: expected 0 <= capacity"),
        ({"capacity": 1.5}, TypeError, "capacity: expected an int, got float"),
        ({"align": 0}, ValueError, "align: expected 1 <= align"),
        ({"priority": "first"}, ValueError, "priority: expected one of choice, token, score"),
        ({"priority": "score"}, ValueError, "scores: expected a tensor for priority=\"score\""),
        ({"scores": torch.zeros(6, 2)}, ValueError, "scores: expected None for priority="),
        ({"scores": torch.zeros(5, 2), "priority": "score"}, ValueError, r"expected \(6, 2\)"),
        ({"num_experts": 65536, "align": 1 << 20}, ValueError, "expert_idx: expected at most 2147"),
    ],
)  # fmt: skip
def test_errors(spec_ids, change, error, message):
    kwargs = {"expert_idx": spec_ids, "num_experts": 4, **change}
    with pytest.raises(error, match=message):
        dashpot.dispatch_plan(**kwargs)
