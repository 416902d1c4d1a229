"""permute: rows gathered by expert."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot import _C
from dashpot.experts.permute import PERMUTE


def plan_of(ids, experts, device="cpu", **kwargs):
    return dashpot.dispatch_plan(ids.to(device), experts, **kwargs)


def cpu_plan(ids, device, **kwargs):
    with dashpot.backend("reference"):
        return dashpot.DispatchPlan(*(t.to(device) for t in plan_of(ids, 4, **kwargs)))


def test_vector(backend, spec_ids):
    """Each row at its slots, zeros in padding and past the end."""
    x = torch.arange(1.0, 13).reshape(6, 2).to(backend.device)
    plan = cpu_plan(spec_ids, backend.device, align=4, capacity=3)
    xp = dashpot.permute(x, plan)
    for slot, flat in enumerate(plan.order.tolist()):
        assert xp[slot].tolist() == ([0.0, 0.0] if flat < 0 else x[flat // 2].tolist())


@pytest.mark.parametrize("how", ["strided", "transposed"])
def test_strides(backend, spec_ids, how):
    x = torch.randn(6, 10, device=backend.device)[:, ::2]
    x = x if how == "strided" else torch.randn(5, 6, device=backend.device).T
    plan = cpu_plan(spec_ids, backend.device)
    assert torch.equal(dashpot.permute(x, plan), dashpot.permute(x.contiguous(), plan))


def test_gradient_is_a_sum_over_choices(backend64, spec_ids):
    x = torch.randn(6, 3, dtype=torch.float64, device=backend64.device, requires_grad=True)
    plan = cpu_plan(spec_ids, backend64.device, capacity=3)
    weight = torch.randn(12, 3, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad((dashpot.permute(x, plan) * weight).sum(), x)
    for t, slots in enumerate(plan.rank.tolist()):
        want = sum((weight[s] for s in slots if s >= 0), torch.zeros_like(weight[0]))
        torch.testing.assert_close(grad[t], want)


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy):
    """Elements beyond 2^31, bytes beyond 2^32; two rows are touched."""
    tokens, d = (1 << 15) + 2, 1 << 16
    x = lazy(tokens, d, device=backend.device)
    x[-1, -1], x[0, 1] = 5, 7
    order = torch.tensor([tokens - 1, 0], dtype=torch.int32, device=backend.device)
    rank = torch.full((tokens, 1), -1, dtype=torch.int32, device=backend.device)
    rank[-1], rank[0] = 0, 1
    xp = PERMUTE(x, order, rank)
    assert xp[0, -1] == 5 and xp[1, 1] == 7 and xp.double().sum() == 12


@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 1024), (torch.bfloat16, 1040)])
def test_results_beyond_the_caches(dtype, d):
    """8 MiB and more are written past the caches where rows are whole lines (1040 numbers are
    not), on each instruction set; padding is zeros there, too. Both ops, both passes, k = 1."""
    tokens = 2100 if dtype == torch.float32 else 4200
    ids = torch.randint(-1, 5, (tokens, 1)).int()
    plan = dashpot.dispatch_plan(ids, 5, align=16)
    x, cotangent = (torch.randn(n, d).to(dtype) for n in (tokens, plan.order.numel()))
    assert x.numel() * x.element_size() > 8 << 20

    def results():
        a, b = x.clone().requires_grad_(), cotangent.clone().requires_grad_()
        xp, y = dashpot.permute(a, plan), dashpot.unpermute(b, plan)
        return xp, y, *torch.autograd.grad([xp, y], [a, b], [cotangent, x])

    with dashpot.backend("reference"):
        want = results()
    best = ("baseline", "avx2", "avx512").index(_C.cpu_isa())
    try:
        for instructions in ("baseline", "avx2", "avx512")[: best + 1]:
            _C.set_cpu_isa(instructions)
            assert all(map(torch.equal, results(), want)), instructions
    finally:
        _C.set_cpu_isa(None)


@pytest.mark.parametrize(
    ("x", "plan", "error", "message"),
    [(torch.ones(5, 2), True, ValueError, r"x: expected \(T, d\) with 6 rows, got \(5, 2\)"),
     (torch.ones(6), True, ValueError, r"x: expected \(T, d\), got \(6,\)"),
     (torch.ones(6, 2).int(), True, TypeError, "x: expected float64, float32, bfloat16 or"),
     (torch.ones(6, 2), False, TypeError, "plan: expected a DispatchPlan, got tuple"),
     (torch.ones(6, 2, device="meta"), True, ValueError, "plan: expected a tensor on meta")],
)  # fmt: skip
def test_errors(spec_ids, x, plan, error, message):
    made = plan_of(spec_ids, 4)
    with pytest.raises(error, match=message):
        dashpot.permute(x, made if plan else tuple(made))
