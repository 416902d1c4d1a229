"""unpermute: rows back to their tokens, choices combined."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot import _C
from dashpot.experts.unpermute import UNPERMUTE


def plan_on(device, ids, **kwargs):
    with dashpot.backend("reference"):
        return dashpot.DispatchPlan(
            *(t.to(device) for t in dashpot.dispatch_plan(ids, 4, **kwargs))
        )


@pytest.mark.parametrize("align", [1, 8])
def test_undoes_permute_k_times(backend, spec_ids, align):
    plan = plan_on(backend.device, spec_ids, align=align)
    x = torch.randn(6, 5, device=backend.device)
    with dashpot.backend(backend.and_others):
        back = dashpot.unpermute(dashpot.permute(x, plan), plan)
    torch.testing.assert_close(back, 2 * x)


def test_weights_and_dropped_choices(backend, spec_ids):
    """A dropped choice adds 0, and neither its weight nor padding is read."""
    plan = plan_on(backend.device, spec_ids, capacity=3)
    h = torch.randn(12, 3, device=backend.device)
    h[9:] = torch.nan
    weights = torch.rand(6, 2, device=backend.device)
    weights[plan.rank < 0] = torch.nan
    y = dashpot.unpermute(h, plan, weights)
    for t, slots in enumerate(plan.rank.tolist()):
        want = sum((weights[t, j] * h[s] for j, s in enumerate(slots) if s >= 0), 0 * h[0])
        torch.testing.assert_close(y[t], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32_with_float32_weights(backend, dtype):
    """256 + 1 - 256: a 16-bit sum would lose the 1."""
    device = backend.device
    h = torch.tensor([[256.0], [1.0], [256.0]], dtype=dtype, device=device)
    plan = plan_on(device, torch.tensor([[0, 1, 2]]))
    weights = torch.tensor([[1.0, 1.0, -1.0]], device=device, requires_grad=True)
    y = dashpot.unpermute(h, plan, weights)
    assert y.item() == 1 and y.dtype == dtype
    y.backward()
    assert weights.grad.dtype == torch.float32 and weights.grad.tolist() == [[256, 1, 256]]


def test_no_choice_kept_is_zero(backend):
    plan = plan_on(backend.device, torch.full((3, 1), -1))
    y = dashpot.unpermute(torch.full((3, 4), torch.nan, device=backend.device), plan)
    assert torch.equal(y, torch.zeros_like(y))


def test_capacity_zero_keeps_nothing(backend, spec_ids):
    """Both ops give zeros, and so do their gradients."""
    device = backend.device
    plan = plan_on(device, spec_ids, capacity=0)
    x, h = (torch.randn(n, 5, device=device).requires_grad_() for n in (6, 12))
    weights = torch.rand(6, 2, device=device).requires_grad_()
    with dashpot.backend(backend.and_others):
        xp, y = dashpot.permute(x, plan), dashpot.unpermute(h, plan, weights)
        grads = torch.autograd.grad([xp, y], [x, h, weights], [h.detach(), x.detach()])
    assert xp.shape == (12, 5) and y.shape == (6, 5)
    assert not any(tensor.any() for tensor in (xp, y, *grads))


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy):
    slots, d = (1 << 15) + 2, 1 << 16
    h = lazy(slots, d, device=backend.device)
    h[-1, -1] = 5
    rank = torch.tensor([[slots - 1, 0], [-1, slots - 1]], dtype=torch.int32, device=backend.device)
    order = torch.full((slots,), -1, dtype=torch.int32, device=backend.device)
    y = UNPERMUTE(h, order, rank, None)
    assert y[0, -1] == 5 and y[1, -1] == 5 and y.double().sum() == 10


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_beyond_the_caches(dtype, k):
    """8 MiB and more are written past the caches: right, and bit for bit what the same tokens give
    in small pieces, on each instruction set; some tokens have dropped choices, or none at all."""
    d, size = 1024, torch.empty((), dtype=dtype).element_size()
    tokens = (8 << 20) // (d * size) + 6
    ids = torch.stack([torch.randperm(4)[:k] for _ in range(tokens)]).int()
    ids[torch.rand(tokens, k) < 0.1] = -1
    ids[3] = -1
    plan = dashpot.dispatch_plan(ids, 4)
    h, weights = torch.randn(tokens * k, d).to(dtype), torch.rand(tokens, k).to(dtype)
    with dashpot.backend("reference"):
        want = dashpot.unpermute(h.double(), plan, weights.double())
    best = ("baseline", "avx2", "avx512").index(_C.cpu_isa())
    try:
        for instructions in ("baseline", "avx2", "avx512")[: best + 1]:
            _C.set_cpu_isa(instructions)
            y = dashpot.unpermute(h, plan, weights)
            assert (y[3] == 0).all()
            torch.testing.assert_close(y, want.to(dtype))
            pieces = zip(plan.rank.split(500), weights.split(500), strict=True)
            small = [UNPERMUTE(h, plan.order, rank, part) for rank, part in pieces]
            assert torch.equal(y, torch.cat(small)), instructions
    finally:
        _C.set_cpu_isa(None)


@pytest.mark.parametrize(
    ("h", "weights", "error", "message"),
    [(torch.ones(11, 2), None, ValueError, r"h: expected \(R, d\) with 12 rows, got \(11, 2\)"),
     (torch.ones(12, 2), torch.ones(6, 1), ValueError, r"weights: expected \(6, 2\), got \(6, 1\)"),
     (torch.ones(12, 2), torch.ones(6, 2).double(), TypeError, "weights: expected torch.float32"),
     (torch.ones(12, 2), [[1, 1]] * 6, TypeError, "weights: expected a torch.Tensor, got list")],
)  # fmt: skip
def test_errors(spec_ids, h, weights, error, message):
    with pytest.raises(error, match=message):
        dashpot.unpermute(h, plan_on("cpu", spec_ids), weights)
