"""grouped_linear: each segment's own linear layer."""

from __future__ import annotations

import dashpot
import pytest
import torch
from torch.nn import functional


def problem(ends, n=5, k=7, dtype=torch.float32, device="cpu", rows=None):
    experts, rows = len(ends), ends[-1] if rows is None else rows
    generator = torch.Generator().manual_seed(3)
    tensors = [
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((rows, k), (experts, n, k), (experts, n))
    ]
    return *tensors, torch.tensor(ends, dtype=torch.int32, device=device)


def loop(xp, weight, bias, ends):
    """The layers one after the other; zeros past the end."""
    out, begin = [], 0
    for e, end in enumerate(ends.tolist()):
        shift = None if bias is None else bias[e]
        out.append(functional.linear(xp[begin:end], weight[e], shift))
        begin = end
    return torch.cat([*out, xp.new_zeros(len(xp) - begin, weight.shape[1])])


ENDS = [[4, 9, 20], [0, 6, 6, 6, 11], [0, 0], [33]]


@pytest.mark.parametrize("ends", ENDS)
def test_is_a_loop_of_layers(backend, ends):
    """Empty experts in front, within and behind; all rows to one; none at all."""
    args = problem(ends, device=backend.device, rows=ends[-1] + 3)
    torch.testing.assert_close(dashpot.grouped_linear(*args), loop(*args), rtol=2e-6, atol=2e-6)
    without = dashpot.grouped_linear(args[0], args[1], None, args[3])
    torch.testing.assert_close(without, loop(args[0], args[1], None, args[3]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("ends", ENDS)
def test_gradients_are_those_of_the_loop(backend, ends):
    """Zeros for an expert without rows and for rows past the end, whatever memory held."""
    *tensors, offsets = problem(ends, device=backend.device, rows=ends[-1] + 3)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    cotangent = torch.randn(ends[-1] + 3, 5, device=backend.device)
    got = torch.autograd.grad(dashpot.grouped_linear(*leaves, offsets), leaves, cotangent)
    with dashpot.backend("reference"):
        want = torch.autograd.grad(loop(*leaves, offsets), leaves, cotangent)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert begin < end or not (got[1][e].any() or got[2][e].any())


def test_gradient_of_a_sum(backend):
    """An expanded gradient (stride 0), which torch's own grouped product refuses."""
    xp, weight, bias, offsets = problem([3, 8], device=backend.device)
    xp.requires_grad_()
    dashpot.grouped_linear(xp, weight, bias, offsets).sum().backward()
    torch.testing.assert_close(xp.grad[0], weight[0].sum(0))


def test_a_row_keeps_its_nan(backend):
    """Neither another expert's rows nor its weights see it."""
    xp, weight, bias, offsets = problem([3, 8], device=backend.device)
    want = dashpot.grouped_linear(xp, weight, bias, offsets)
    xp[1] = torch.nan
    got = dashpot.grouped_linear(xp, weight, bias, offsets)
    assert got[1].isnan().all()
    rest = [0, *range(2, 8)]
    torch.testing.assert_close(got[rest], want[rest])


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy):
    """Elements beyond 2^31: the last row is another expert's."""
    rows, k = (1 << 15) + 2, 1 << 16
    xp = lazy(rows, k, device=backend.device)
    xp[-1, -1], xp[0, 0] = 5, 7
    weight = torch.full((2, 1, k), 2.0, dtype=torch.bfloat16, device=backend.device)
    weight[1] = 3
    offsets = torch.tensor([rows - 1, rows], dtype=torch.int32, device=backend.device)
    y = dashpot.grouped_linear(xp, weight, None, offsets)
    assert y[0].item() == 14 and y[-1].item() == 15 and y.double().sum() == 29


def test_against_torch_grouped_mm():
    xp, weight, _, offsets = problem([8, 24, 32], n=16, k=32, dtype=torch.bfloat16)
    want = functional.grouped_mm(xp, weight.mT, offs=offsets)
    got = dashpot.grouped_linear(xp, weight, None, offsets)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_offsets_that_are_none():
    xp, weight, bias, _ = problem([3, 8])
    for ends in ([5, 3], [3, 9]):
        with dashpot.backend("cpp"), pytest.raises(ValueError, match="offsets: expected ascending"):
            dashpot.grouped_linear(xp, weight, bias, torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"xp": torch.ones(8)}, ValueError, r"xp: expected \(R, K\), got \(8,\)"),
     ({"weight": torch.ones(2, 5, 6)}, ValueError, r"weight: expected \(E, N, 7\), E >= 1"),
     ({"weight": torch.ones(0, 5, 7)}, ValueError, r"weight: expected \(E, N, 7\), E >= 1"),
     ({"weight": torch.ones(2, 5, 7).bfloat16()}, TypeError, "weight: expected torch.float32, got"),
     ({"bias": torch.ones(2, 4)}, ValueError, r"bias: expected \(2, 5\), got \(2, 4\)"),
     ({"bias": torch.ones(2, 5).double()}, TypeError, "bias: expected torch.float32, got"),
     ({"offsets": torch.tensor([3, 8])}, TypeError, "offsets: expected int32, got torch.int64"),
     ({"offsets": [3, 8]}, TypeError, "offsets: expected a torch.Tensor, got list"),
     ({"offsets": torch.tensor([8]).int()}, ValueError, r"offsets: expected \(2,\) on cpu, got")],
)  # fmt: skip
def test_errors(change, error, message):
    names = ("xp", "weight", "bias", "offsets")
    kwargs = {**dict(zip(names, problem([3, 8]), strict=True)), **change}
    with pytest.raises(error, match=message):
        dashpot.grouped_linear(**kwargs)
