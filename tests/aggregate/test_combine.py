"""combine: u = c^T G in one read and one write."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def coefficients(p: int, device="cpu") -> torch.Tensor:
    """(p,) float64, of both signs, none zero."""
    return (torch.arange(p, dtype=torch.float64) * 0.37 - 1.05).to(device)


def test_vector(backend64, spec_rows):
    coeffs = torch.tensor([1.0, 2, 0, -1, 0.5], dtype=torch.float64, device=backend64.device)
    update = dashpot.combine(spec_rows(device=backend64.device), coeffs)
    want = torch.tensor([0.8, 3.95, 2, -0.8], dtype=torch.float64)
    torch.testing.assert_close(update.cpu(), want, rtol=0, atol=1e-14)


@given(p=st.integers(1, 9), d=st.integers(0, 70), seed=st.integers(0, 99))
def test_linear_in_both(backend64, random_rows, p, d, seed):
    device = backend64.device
    rows, other = random_rows(p, d, seed, device=device), random_rows(p, d, seed + 1, device=device)
    coeffs = coefficients(p, device)
    update = dashpot.combine(rows, coeffs)
    assert update.shape == (d,) and update.dtype == torch.float64
    torch.testing.assert_close(
        dashpot.combine(rows, 2 * coeffs), 2 * update, rtol=1e-13, atol=1e-13
    )
    both = dashpot.combine(rows + other, coeffs)
    torch.testing.assert_close(
        both, update + dashpot.combine(other, coeffs), rtol=1e-12, atol=1e-12
    )
    order = torch.randperm(p)
    moved = dashpot.combine(rows[order], coeffs[order])
    torch.testing.assert_close(moved, update, rtol=1e-12, atol=1e-12)


def test_one_worker_comes_through_unchanged(backend, random_rows):
    rows = random_rows(5, 37, dtype=torch.float32, device=backend.device)
    pick = torch.zeros(5, dtype=torch.float64, device=backend.device)
    pick[3] = 1
    assert torch.equal(dashpot.combine(rows, pick), rows[3])


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_zero_coefficient_is_not_read(backend, random_rows, forms, flat, form, bad):
    """0 * NaN must not leak; a NaN that is used must."""
    rows = random_rows(4, 34, dtype=torch.float32, device=backend.device)
    coeffs = coefficients(4, backend.device)
    coeffs[1] = 0
    want = flat(dashpot.combine(rows, coeffs))
    rows[1] = bad
    torch.testing.assert_close(flat(dashpot.combine(forms(rows)[form], coeffs)), want)
    rows[2, 5] = bad
    assert not flat(dashpot.combine(forms(rows)[form], coeffs))[5].isfinite()


def test_no_worker_counts(backend, random_rows):
    rows = random_rows(3, 20, dtype=torch.float32, device=backend.device) * torch.nan
    update = dashpot.combine(rows, torch.zeros(3, dtype=torch.float64, device=backend.device))
    assert torch.equal(update, torch.zeros(20, device=backend.device))


def test_every_form_gives_the_same(backend64, random_rows, forms, flat):
    """And each comes back in one worker's shape."""
    rows = random_rows(4, 26, device=backend64.device)
    coeffs = coefficients(4, backend64.device)
    for name, grads in forms(rows).items():
        update = dashpot.combine(grads, coeffs)
        torch.testing.assert_close(flat(update), coeffs @ rows, rtol=1e-13, atol=1e-13)
        if name == "lists":
            assert [tensor.shape for tensor in update] == [tensor.shape for tensor in grads[0]]
        else:
            assert update.shape == grads[0].shape


def test_parameters_of_mixed_dtypes_keep_their_order(backend, random_rows):
    rows = random_rows(3, 30, dtype=torch.float32, device=backend.device)
    coeffs = coefficients(3, backend.device)
    lists = [[row[:8].half(), row[8:20].clone(), row[20:].half()] for row in rows]
    update = dashpot.combine(lists, coeffs)
    assert [tensor.dtype for tensor in update] == [torch.float16, torch.float32, torch.float16]
    for s, tensor in enumerate(update):
        column = torch.stack([row[s] for row in lists]).double()
        tolerance = 4 * torch.finfo(tensor.dtype).eps
        torch.testing.assert_close(tensor.double(), coeffs @ column, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_in_float32(backend, dtype):
    """256 + 1 - 256: a 16-bit sum would lose the 1."""
    rows = torch.tensor([[256.0], [1.0], [256.0]], dtype=dtype, device=backend.device)
    coeffs = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64, device=backend.device)
    assert dashpot.combine(rows, coeffs).item() == 1


def test_float32_coefficients(backend, random_rows):
    rows = random_rows(3, 20, dtype=torch.float32, device=backend.device)
    coeffs = torch.tensor([0.5, -2, 0.25], device=backend.device)
    assert torch.equal(dashpot.combine(rows, coeffs), dashpot.combine(rows, coeffs.double()))


@pytest.mark.parametrize("form", ["tensor", "tensor (p, 2, d/2)", "list", "lists"])
def test_out(backend, random_rows, forms, flat, form):
    """Written in place, nothing left over, and the very objects come back."""
    grads = forms(random_rows(4, 26, dtype=torch.float32, device=backend.device))[form]
    coeffs = coefficients(4, backend.device)
    want = dashpot.combine(grads, coeffs)
    out = [torch.empty_like(t) for t in grads[0]] if form == "lists" else torch.empty_like(grads[0])
    assert flat(out).isnan().all()
    result = dashpot.combine(grads, coeffs, out=out)
    assert result is out
    assert torch.equal(flat(out), flat(want))


def test_out_takes_no_gradient(backend, random_rows):
    rows = random_rows(3, 8, dtype=torch.float32, device=backend.device)
    coeffs = coefficients(3, backend.device)
    out = torch.empty_like(rows[0])
    with pytest.raises(RuntimeError, match="out= does not support gradients"):
        dashpot.combine(rows.clone().requires_grad_(), coeffs, out=out)
    with torch.no_grad():
        dashpot.combine(rows.clone().requires_grad_(), coeffs, out=out)
    assert torch.equal(out, dashpot.combine(rows, coeffs))


def test_any_strides(backend64, random_rows):
    rows = random_rows(1, 26, device=backend64.device).expand(4, 26)
    coeffs = coefficients(8, backend64.device)[::2]
    want = coeffs.sum() * rows[0, ::2]
    torch.testing.assert_close(dashpot.combine(rows[:, ::2], coeffs), want)
    torch.testing.assert_close(dashpot.combine(list(rows[:, ::2]), coeffs), want)


def test_gradients(backend64, random_rows):
    """dg_i = c_i du, dc_i = <g_i, du>."""
    rows = random_rows(4, 19, device=backend64.device).requires_grad_()
    coeffs = coefficients(4, backend64.device).requires_grad_()
    du = torch.randn(19, dtype=torch.float64, device=backend64.device)
    grad_rows, grad_coeffs = torch.autograd.grad(dashpot.combine(rows, coeffs), (rows, coeffs), du)
    torch.testing.assert_close(grad_rows, torch.outer(coeffs.detach(), du))
    torch.testing.assert_close(grad_coeffs, rows.detach() @ du)


def test_gradients_through_lists_of_mixed_dtypes(backend, random_rows):
    rows = random_rows(3, 19, dtype=torch.float32, device=backend.device)
    coeffs = coefficients(3, backend.device).requires_grad_()
    lists = [[row[:7].half().requires_grad_(), row[7:].clone().requires_grad_()] for row in rows]
    leaves = [tensor for row in lists for tensor in row]
    total = sum(tensor.float().sum() for tensor in dashpot.combine(lists, coeffs))
    *grads, grad_coeffs = torch.autograd.grad(total, [*leaves, coeffs])
    for i, grad in enumerate(grads):
        assert grad.dtype == leaves[i].dtype
        want = coeffs[i // 2].detach().expand_as(grad).to(grad.dtype)
        torch.testing.assert_close(grad, want)
    sums = torch.stack([sum(t.detach().double().sum() for t in row) for row in lists])
    torch.testing.assert_close(grad_coeffs, sums, rtol=1e-5, atol=1e-5)


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy_zeros):
    """33 bfloat16 rows of 2^26 + 8: the last one starts past element 2^31. Only a few of its pages
    are ever touched; the rest reads as zero."""
    p, d = 33, 2**26 + 8
    rows = lazy_zeros(p, d, backend.device)
    rows[0, -2:], rows[-1, -2:] = 2, 3
    coeffs = torch.zeros(p, dtype=torch.float64, device=backend.device)
    coeffs[0], coeffs[-1] = 1, 10
    update = dashpot.combine(rows, coeffs)
    assert torch.equal(update[-4:].cpu(), torch.tensor([0, 0, 32, 32], dtype=torch.bfloat16))
    assert not update[:-2].any()


# --------------------------------------------------------------------------------------------
# Errors: the argument, what was expected, what came


ROWS, COEFFS = torch.ones(3, 4), torch.ones(3, dtype=torch.float64)
BAD = [
    (lambda: dashpot.combine(7, COEFFS), TypeError, r"grads: .*got int"),
    (lambda: dashpot.combine(ROWS, [1.0] * 3), TypeError, r"coeffs: .*Tensor.*got list"),
    (lambda: dashpot.combine(ROWS, COEFFS.half()), TypeError, r"coeffs: .*float64.*float16"),
    (lambda: dashpot.combine(ROWS, torch.ones(4)), ValueError, r"coeffs: .*\(3,\).*\(4,\)"),
    (lambda: dashpot.combine(ROWS, torch.ones(3, 1)), ValueError, r"coeffs: .*\(3,\).*\(3, 1\)"),
    (lambda: dashpot.combine(ROWS, torch.ones(3, device="meta")), ValueError,
     r"coeffs: .*on cpu.*on meta"),
    (lambda: dashpot.combine(ROWS, COEFFS, out=3), TypeError, r"out: .*Tensor.*got int"),
    (lambda: dashpot.combine(ROWS, COEFFS, out=torch.ones(5)), ValueError,
     r"out: .*\(4,\).*got \(5,\)"),
    (lambda: dashpot.combine(ROWS, COEFFS, out=torch.ones(4).half()), ValueError,
     r"out: .*float32.*got .*float16"),
    (lambda: dashpot.combine(ROWS, COEFFS, out=torch.ones(8)[::2]), ValueError,
     r"out: .*contiguous.*not contiguous"),
    (lambda: dashpot.combine([[r, r] for r in ROWS], COEFFS, out=torch.ones(4)), TypeError,
     r"out: .*list of 2 tensors.*got Tensor"),
    (lambda: dashpot.combine([[r, r] for r in ROWS], COEFFS, out=[torch.ones(4)]), TypeError,
     r"out: .*list of 2 tensors.*got"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
