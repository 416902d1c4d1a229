"""centered_clipping: with and without a centre, in every form of the rows."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def by_definition(rows, v, tau, n_iter):
    for _ in range(n_iter):
        gap = rows - v
        v = v + (gap * (tau / gap.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
    return v


VECTORS = [
    (1, [0.2348570616, 0.6577735769, 0.1650908246, -0.253753273]),
    (3, [0.8022880482, 1.7538388421, 0.2325228563, -0.7955637131]),
]


@pytest.mark.parametrize(("n_iter", "want"), VECTORS)
def test_vectors(backend64, spec_rows, n_iter, want):
    rows = spec_rows(device=backend64.device)
    for center in (None, torch.zeros_like(rows[0])):
        update = dashpot.centered_clipping(rows, 1.0, center=center, n_iter=n_iter)
        torch.testing.assert_close(update.tolist(), want, rtol=0, atol=1e-9)


@given(p=st.integers(1, 8), seed=st.integers(0, 99), n_iter=st.integers(0, 4))
def test_definition(backend64, random_rows, p, seed, n_iter):
    rows, center = random_rows(p, 12, seed), random_rows(1, 12, seed + 1)[0]
    for start in (None, center):
        update = dashpot.centered_clipping(
            rows.to(backend64.device), 2.0, n_iter=n_iter,
            center=None if start is None else start.to(backend64.device),
        )  # fmt: skip
        want = by_definition(
            rows, torch.zeros(12).double() if start is None else start, 2.0, n_iter
        )
        torch.testing.assert_close(update.cpu(), want, rtol=1e-9, atol=1e-9)


def test_centre_in_every_form(backend64, random_rows, forms, flat):
    """It comes as one worker's gradients come, and is read where it lies."""
    points = random_rows(6, 26, device=backend64.device)
    want = dashpot.centered_clipping(points[:5], 2.0, center=points[5], n_iter=2)
    for name, grads in forms(points).items():
        update = dashpot.centered_clipping(grads[:5], 2.0, center=grads[5], n_iter=2)
        torch.testing.assert_close(flat(update), want)
        assert isinstance(update, list) == (name == "lists")


def test_parameters_of_mixed_dtypes(backend, random_rows):
    points = random_rows(5, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:8].half(), row[8:20].clone(), row[20:].half()] for row in points]
    update = dashpot.centered_clipping(lists[:4], 2.0, center=lists[4])
    assert [part.dtype for part in update] == [torch.float16, torch.float32, torch.float16]
    wide = torch.stack([torch.cat([t.double() for t in row]) for row in lists]).cpu()
    want = by_definition(wide[:4], wide[4], 2.0, 1)
    got = torch.cat([part.double().cpu() for part in update])
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3)


def test_bad_rows(backend, random_rows):
    points = random_rows(8, 34, dtype=torch.float32, device=backend.device)
    rows, center = points[:7].clone(), points[7]
    kept = rows[[0, 1, 3, 5, 6]].clone()
    rows[2], rows[4, 1] = torch.nan, torch.inf
    for start in (None, center):
        want = dashpot.centered_clipping(kept, 2.0, center=start)
        got = dashpot.centered_clipping(rows, 2.0, center=start)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"workers \[2, 4\]"):
        dashpot.centered_clipping(rows, 2.0, center=center, nonfinite="raise")
    lost = torch.full_like(center, torch.nan)
    assert dashpot.centered_clipping(kept, 2.0, center=lost).isnan().all()


def test_gradient_holds_the_coefficients(backend64, random_rows):
    """To the rows and to the centre; exact where nothing is clipped."""
    points = random_rows(6, 8, device=backend64.device)
    coeffs = dashpot.centered_clipping_coeffs(dashpot.pairwise_sqdist(points), 2.0)
    rows, center = points[:5].clone().requires_grad_(), points[5].clone().requires_grad_()
    update = dashpot.centered_clipping(rows, 2.0, center=center)
    du = torch.randn(8, dtype=torch.float64, device=backend64.device)
    grads = torch.autograd.grad(update, [rows, center], du)
    torch.testing.assert_close(torch.cat([grads[0], grads[1][None]]), torch.outer(coeffs, du))
    assert torch.autograd.gradcheck(
        lambda rows, center: dashpot.centered_clipping(rows, 1e3, center=center), [rows, center]
    )


def test_errors(random_rows):
    rows = random_rows(5, 8)
    with pytest.raises(ValueError, match=r"center: expected \(8,\).*got \(7,\)"):
        dashpot.centered_clipping(rows, 1.0, center=torch.zeros(7).double())
    with pytest.raises(ValueError, match=r"center: .*torch.float64.*got .*torch.float32"):
        dashpot.centered_clipping(rows, 1.0, center=torch.zeros(8))
    with pytest.raises(TypeError, match=r"center: expected a torch.Tensor, got float"):
        dashpot.centered_clipping(rows, 1.0, center=0.0)
    lists = [[row[:3], row[3:]] for row in rows]
    with pytest.raises(ValueError, match=r"center: expected a list of 2 tensors.*got Tensor"):
        dashpot.centered_clipping(lists, 1.0, center=rows[0])
    with pytest.raises(ValueError, match="tau: expected a finite number >= 0"):
        dashpot.centered_clipping(rows, torch.inf)
