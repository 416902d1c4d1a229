"""The backend "torch": F.grouped_mm under grouped_linear and expert_mlp, and what it lacks."""

from __future__ import annotations

import dashpot
import pytest
import torch
from torch.nn import functional

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(ends, rows, n=8, k=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    shapes = ((rows, k), (len(ends), n, k), (len(ends), n))
    tensors = [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    return tensors, torch.tensor(ends, dtype=torch.int32)


def both(function, leaves, cotangent):
    """Outputs and gradients by F.grouped_mm and by the reference."""
    results = []
    for name in ("torch", "reference"):
        with dashpot.backend(name):
            y = function()
        results.append((y, *torch.autograd.grad(y, leaves, cotangent)))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[4, 9, 20], [0, 6, 6, 6, 11], [0, 0], [33]])
def test_grouped_linear(ends, dtype):
    """Experts without rows in front, within and behind; a bias; rows past the end, which
    F.grouped_mm leaves as they were: zeros, and zeros as gradients."""
    tensors, offsets = problem(ends, ends[-1] + 3, dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    cotangent = torch.randn(ends[-1] + 3, 8).to(dtype)
    got, want = both(lambda: dashpot.grouped_linear(*leaves, offsets), leaves, cotangent)
    slack = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, want, rtol=slack, atol=slack)
    assert not got[0][ends[-1] :].any() and not got[1][ends[-1] :].any()
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert begin < end or not (got[2][e].any() or got[3][e].any())


def test_the_gradient_of_a_sum():
    """It is expanded (stride 0), which F.grouped_mm itself refuses."""
    (xp, weight, bias), offsets = problem([3, 8], 8)
    xp.requires_grad_()
    with pytest.raises(RuntimeError):
        functional.grouped_mm(xp, weight.mT, offs=offsets).sum().backward()
    with dashpot.backend("torch"):
        dashpot.grouped_linear(xp, weight, bias, offsets).sum().backward()
    torch.testing.assert_close(xp.grad[0], weight[0].sum(0))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_expert_mlp(activation, gated, weighted):
    """Two choices, some not routed, one expert without tokens; all gradients."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape):
        return torch.randn(*shape, generator=generator).mul(0.5).requires_grad_()

    rows = 24 if gated else 12
    leaves = [make(30, 8), make(5, rows, 8), make(5, rows), make(5, 8, 12), make(5, 8)]
    plan = dashpot.dispatch_plan(torch.randint(-1, 4, (30, 2), generator=generator).int(), 5)
    leaves += [make(30, 2)] if weighted else []
    options = {"weights": leaves[5] if weighted else None, "activation": activation}
    got, want = both(
        lambda: dashpot.expert_mlp(leaves[0], plan, *leaves[1:5], gated=gated, **options),
        leaves, torch.randn(30, 8, generator=generator),
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_it_serves_when_asked_for_alone():
    """The dispatcher does not take it by itself: on the CPU it is a loop."""
    (xp, weight, bias), offsets = problem([3, 8], 8)
    rows = dashpot.explain(dashpot.grouped_linear, xp, weight, bias, offsets).rows
    verdicts = {name: verdict for _, name, verdict in rows}
    assert verdicts["torch"] == "can run" and verdicts["cpp"] == "chosen"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"k": 6}, "takes widths that are multiples of 4, got 8, 6"),
     ({"n": 12, "dtype": torch.bfloat16}, "takes widths that are multiples of 8, got 12, 16"),
     ({"dtype": torch.float64}, "does not take torch.float64"),
     ({"ends": [0, 0], "rows": 0}, "takes at least one row")],
)  # fmt: skip
def test_calls_that_it_cannot_take(change, message):
    tensors, offsets = problem(**{"ends": [3, 8], "rows": 8, **change})
    with dashpot.backend("torch"), pytest.raises(RuntimeError, match=message):
        dashpot.grouped_linear(*tensors, offsets)


def test_a_torch_that_has_none(monkeypatch):
    tensors, offsets = problem([3, 8], 8)
    monkeypatch.delattr(functional, "grouped_mm")
    with dashpot.backend("torch"), pytest.raises(RuntimeError, match="has no torch"):
        dashpot.grouped_linear(*tensors, offsets)


def test_ops_that_it_has_no_function_for():
    with dashpot.backend("torch"):
        with pytest.raises(RuntimeError, match="not built: no dispatch_plan_forward"):
            dashpot.dispatch_plan(torch.zeros(2).int(), 1)
        with pytest.raises(RuntimeError, match="PyTorch has no function for the ops of aggregate"):
            dashpot.gram([torch.ones(3, 4)])
