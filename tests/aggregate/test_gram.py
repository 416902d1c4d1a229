"""gram: K = G G^T in one read."""

from __future__ import annotations

import dashpot
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def test_vector(backend64):
    """Integers: every sum is exact."""
    rows = torch.tensor([[1, 2, 3], [-4, 5, 0], [0, 0, 7]], device=backend64.device).double()
    want = torch.tensor([[14, 6, 21], [6, 41, 0], [21, 0, 49]]).double()
    assert torch.equal(dashpot.gram(rows).cpu(), want)


@given(p=st.integers(1, 9), d=st.integers(0, 70), seed=st.integers(0, 99))
def test_symmetric_positive_and_permutes_with_the_workers(backend64, random_rows, p, d, seed):
    rows = random_rows(p, d, seed, device=backend64.device)
    k = dashpot.gram(rows)
    assert k.shape == (p, p) and k.dtype == torch.float64
    torch.testing.assert_close(k, k.mT, rtol=1e-14, atol=1e-13)
    assert torch.linalg.eigvalsh(k).min() >= -1e-12 * (1 + k.abs().max())
    order = torch.randperm(p)
    torch.testing.assert_close(dashpot.gram(rows[order]), k[order][:, order], rtol=1e-13, atol=0)


@given(cut=st.integers(0, 50), seed=st.integers(0, 99))
def test_shards_add_up(backend64, random_rows, cut, seed):
    rows = random_rows(6, 50, seed, device=backend64.device)
    shards = dashpot.gram(rows[:, :cut]) + dashpot.gram(rows[:, cut:])
    torch.testing.assert_close(shards, dashpot.gram(rows), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp64_sums_are_exact_to_their_rounding(backend, random_rows, dtype):
    """Products of 16-bit and 32-bit numbers are exact in float64; only the sum rounds."""
    rows = random_rows(4, 3000, dtype=dtype, device=backend.device)
    want = rows.double() @ rows.double().mT
    torch.testing.assert_close(dashpot.gram(rows, accum="fp64"), want, rtol=1e-13, atol=1e-11)


@pytest.mark.backends("kernels")
def test_fp32_sums_do_not_grow_worse_with_the_length(backend):
    """40,000 times 0.1^2: a float32 sum alone would lose four digits."""
    rows = torch.full((2, 40_000), 0.1, device=backend.device)
    want = (rows.double() ** 2).sum(1)[:, None].expand(2, 2)
    torch.testing.assert_close(dashpot.gram(rows, accum="fp32"), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_beyond_float32(backend, random_rows, scale):
    rows = random_rows(3, 40, dtype=torch.float32, device=backend.device)
    rows[1] *= scale
    want = rows.double() @ rows.double().mT
    torch.testing.assert_close(dashpot.gram(rows, accum="fp64"), want, rtol=1e-12, atol=0)


@pytest.mark.backends("kernels")
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_beyond_float32_with_fp32_sums(backend, random_rows, scale):
    """A kernel sees that a square left float32's range and sums in float64."""
    rows = random_rows(3, 40, dtype=torch.float32, device=backend.device)
    rows[1] *= scale
    want = rows.double() @ rows.double().mT
    torch.testing.assert_close(dashpot.gram(rows, accum="fp32"), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("accum", ["fp64", "fp32"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_its_own_entries_only(backend, random_rows, accum, bad):
    rows = random_rows(5, 33, dtype=torch.float32, device=backend.device)
    clean = dashpot.gram(rows, accum=accum)
    rows[2, 7] = bad
    k = dashpot.gram(rows, accum=accum)
    others = torch.tensor([0, 1, 3, 4])
    assert not k[2, 2].isfinite()
    torch.testing.assert_close(k[others][:, others], clean[others][:, others], rtol=1e-6, atol=0)


@pytest.mark.parametrize("accum", ["fp64", "fp32"])
@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
def test_mask_leaves_rows_out(backend, random_rows, forms, accum, form):
    rows = random_rows(5, 34, dtype=torch.float32, device=backend.device)
    mask = torch.tensor([True, False, True, True, False], device=backend.device)
    clean = dashpot.gram(rows, accum=accum)
    rows[~mask] = torch.nan
    k = dashpot.gram(forms(rows)[form], accum=accum, mask=mask)
    both = mask[:, None] & mask[None, :]
    torch.testing.assert_close(k, torch.where(both, clean, 0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("none", [True, False])
def test_all_masked_or_none(backend, random_rows, none):
    rows = random_rows(3, 20, dtype=torch.float32, device=backend.device)
    mask = torch.full((3,), not none, device=backend.device)
    want = torch.zeros_like(dashpot.gram(rows)) if none else dashpot.gram(rows)
    torch.testing.assert_close(dashpot.gram(rows, mask=mask), want)


def test_every_form_gives_the_same(backend64, random_rows, forms):
    rows = random_rows(4, 26, device=backend64.device)
    want = rows @ rows.mT
    for grads in forms(rows).values():
        torch.testing.assert_close(dashpot.gram(grads), want, rtol=1e-13, atol=1e-13)


def test_parameters_of_mixed_dtypes(backend, random_rows):
    """Each dtype is a group of its own; their Gram matrices add."""
    rows = random_rows(3, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:10].half(), row[10:].clone()] for row in rows]
    parts = torch.cat([rows[:, :10].half().double(), rows[:, 10:].double()], dim=1)
    torch.testing.assert_close(dashpot.gram(lists), parts @ parts.mT, rtol=1e-12, atol=1e-12)


def test_mask_of_any_stride(backend, random_rows):
    rows = random_rows(3, 20, dtype=torch.float32, device=backend.device)
    mask = torch.tensor([True, False, False, False, True, True], device=backend.device)[::2]
    want = dashpot.gram(rows, mask=mask.clone().contiguous())
    assert torch.equal(dashpot.gram(rows, mask=mask), want) and not want[1].any()


def test_rows_of_stride_zero(backend64, random_rows):
    rows = random_rows(1, 26, device=backend64.device).expand(4, 26)
    want = rows[0].square().sum().expand(4, 4)
    torch.testing.assert_close(dashpot.gram(rows), want, rtol=1e-13, atol=0)
    torch.testing.assert_close(dashpot.gram(list(rows[:, ::2])), dashpot.gram(rows[:, ::2]))


def test_gradient(backend64, random_rows):
    """dG = (dK + dK^T) G, for an asymmetric dK too."""
    rows = random_rows(4, 19, device=backend64.device).requires_grad_()
    dk = torch.randn(4, 4, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad(dashpot.gram(rows), rows, dk)
    torch.testing.assert_close(grad, (dk + dk.mT) @ rows.detach())


def test_gradient_through_lists_and_mask(backend64, random_rows):
    rows = random_rows(3, 19, device=backend64.device)
    mask = torch.tensor([True, False, True], device=backend64.device)
    lists = [[row[:7].clone().requires_grad_(), row[7:].clone().requires_grad_()] for row in rows]
    dk = torch.randn(3, 3, dtype=torch.float64, device=backend64.device)
    leaves = [tensor for row in lists for tensor in row]
    grads = torch.autograd.grad(dashpot.gram(lists, mask=mask), leaves, dk)
    dk = dk * (mask[:, None] & mask[None, :])
    want = (dk + dk.mT) @ rows
    torch.testing.assert_close(torch.cat(grads).reshape(3, 19), want)


def test_numpy_in_numpy_out(random_rows):
    rows = random_rows(3, 12).numpy()
    k = dashpot.gram(rows)
    assert isinstance(k, np.ndarray)
    np.testing.assert_allclose(k, rows @ rows.T, rtol=1e-13)


@pytest.mark.backends("native")
def test_offsets_beyond_32_bits(backend, lazy_zeros):
    """33 bfloat16 rows of 2^26 + 8: the last one starts past element 2^31. Only a few pages are
    ever touched; the rest reads as zero."""
    p, d = 33, 2**26 + 8
    rows = lazy_zeros(p, d, backend.device)
    rows[0, -2:], rows[-1, -2:] = 2, 3
    want = torch.zeros(p, p, dtype=torch.float64)
    want[0, 0], want[0, -1], want[-1, 0], want[-1, -1] = 8, 12, 12, 18
    assert torch.equal(dashpot.gram(rows, accum="fp32").cpu(), want)


@pytest.mark.backends("native")
def test_a_row_beyond_32_bits(backend, lazy_zeros):
    """More coordinates than an int counts, in one row."""
    rows = lazy_zeros(1, 2**31 + 9, backend.device)
    rows[0, 0], rows[0, -1] = 2, 3
    assert dashpot.gram(rows, accum="fp32").item() == 13


# --------------------------------------------------------------------------------------------
# Errors: the argument, what was expected, what came


ROWS = torch.ones(3, 4)
BAD = [
    (lambda: dashpot.gram(None), TypeError, r"grads: .*tensor.*got NoneType"),
    (lambda: dashpot.gram(torch.tensor(1.0)), ValueError, r"grads: .*\(p, \.\.\.\).*scalar"),
    (lambda: dashpot.gram(torch.ones(0, 4)), ValueError, r"grads: .*one worker.*\(0, 4\)"),
    (lambda: dashpot.gram(torch.ones(3, 4).int()), TypeError, r"grads: .*float64.*got torch.int32"),
    (lambda: dashpot.gram(ROWS.to_sparse()), TypeError, r"grads: .*dense.*sparse"),
    (lambda: dashpot.gram([]), ValueError, r"grads: .*one worker.*empty list"),
    (lambda: dashpot.gram([ROWS[0], 1.0]), TypeError, r"grads\[1\]: .*Tensor.*got float"),
    (lambda: dashpot.gram([ROWS[0], ROWS[0, :3]]), ValueError, r"grads\[1\]: .*\(4,\).*\(3,\)"),
    (lambda: dashpot.gram([ROWS[0], ROWS[0].half()]), ValueError,
     r"grads\[1\]: .*float32.*got .*float16"),
    (lambda: dashpot.gram([[ROWS[0]], ROWS[0]]), ValueError, r"grads\[1\]: .*1 tensors.*got"),
    (lambda: dashpot.gram([[ROWS[0]], [ROWS[0], ROWS[0]]]), ValueError,
     r"grads\[1\]: .*1 tensors.*2 tensors"),
    (lambda: dashpot.gram([[], []]), ValueError, r"grads\[0\]: .*empty list"),
    (lambda: dashpot.gram([[ROWS[0], ROWS[1]], [ROWS[0], ROWS[1, :2]]]), ValueError,
     r"grads\[1\]\[1\]: .*\(4,\).*\(2,\)"),
    (lambda: dashpot.gram(ROWS, accum="fp16"), ValueError, r"accum: .*fp64, fp32.*'fp16'"),
    (lambda: dashpot.gram(ROWS, mask=[True] * 3), TypeError, r"mask: .*Tensor.*got list"),
    (lambda: dashpot.gram(ROWS, mask=torch.ones(3)), ValueError, r"mask: .*bool.*float32"),
    (lambda: dashpot.gram(ROWS, mask=torch.ones(2).bool()), ValueError, r"mask: .*\(3,\).*\(2,\)"),
    (lambda: dashpot.gram(ROWS, mask=torch.ones(3, device="meta").bool()), ValueError,
     r"mask: .*on cpu.*on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
