"""geometric_median: the fixed point, and what libraries give."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers

CLOSE = {"rtol": 0, "atol": 1e-9}  # the specification's vectors have ten digits


def test_vectors(backend64, spec_rows):
    rows = spec_rows(device=backend64.device)
    median = dashpot.geometric_median(rows, nu=1e-9, n_iter=200, tol=0.0)
    want = [1.0290466362, 1.9348871099, 0.0949000699, -0.9754868801]
    torch.testing.assert_close(median.tolist(), want, **CLOSE)
    three = dashpot.geometric_median(rows, nu=0.1, n_iter=3, start="zero")
    want = [1.0218678202, 1.9246708456, 0.1117834439, -0.9653315024]
    torch.testing.assert_close(three.tolist(), want, **CLOSE)


@pytest.mark.peers
@pytest.mark.parametrize("p", [2, 5, 15, 33])
def test_geom_medians_fixed_point(backend64, random_rows, p):
    """Both with all the steps they need; weights too."""
    compute = peers.load("geom_median.torch").compute_geometric_median
    rows = random_rows(p, 40)
    weights = torch.rand(p, generator=torch.Generator().manual_seed(0)).double() + 0.5
    for a in (torch.ones(p).double(), weights):
        median = dashpot.geometric_median(rows.to(backend64.device), weights=a.to(backend64.device))
        want = compute(rows, weights=a, maxiter=1000, ftol=0.0).median
        torch.testing.assert_close(median.cpu(), want, rtol=0, atol=1e-7)


@given(p=st.integers(3, 9), seed=st.integers(0, 99))
def test_no_point_is_better(backend64, random_rows, p, seed):
    """The sum of unit vectors to the rows vanishes."""
    rows = random_rows(p, 12, seed)
    median = dashpot.geometric_median(rows.to(backend64.device), n_iter=500).cpu()
    gaps = rows - median
    pull = (gaps / gaps.norm(dim=1, keepdim=True)).sum(0)
    assert pull.norm() < 1e-6


@given(seed=st.integers(0, 99))
def test_invariances(backend64, random_rows, seed):
    rows = random_rows(7, 12, seed, device=backend64.device)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q.to(backend64.device)
    median = dashpot.geometric_median(rows)
    close = {"rtol": 1e-7, "atol": 1e-7}
    order = torch.randperm(7)
    torch.testing.assert_close(dashpot.geometric_median(rows[order]), median, **close)
    torch.testing.assert_close(
        dashpot.geometric_median(rows @ turn + 2), median @ turn + 2, **close
    )


def test_a_loud_liar_moves_it_little(backend, random_rows):
    """Seven of fifteen, a thousand times as loud, in float32."""
    rows = random_rows(15, 500, dtype=torch.float32)
    rows[8:] = 1000 * torch.randn(7, 500, generator=torch.Generator().manual_seed(0))
    median = dashpot.geometric_median(rows.to(backend.device)).cpu()
    honest = rows[:8].mean(0)
    assert (median - honest).norm() < 1.5 * honest.norm()
    assert (rows.mean(0) - honest).norm() > 50 * honest.norm()


def test_bad_rows(backend, random_rows):
    rows = random_rows(7, 34, dtype=torch.float32, device=backend.device)
    kept = rows[[0, 1, 3, 5, 6]].clone()
    rows[2], rows[4, 1] = torch.nan, torch.inf
    for start in ("mean", "zero"):
        want = dashpot.geometric_median(kept, start=start)
        got = dashpot.geometric_median(rows, start=start)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    rows[:] = torch.nan
    assert dashpot.geometric_median(rows).isnan().all()


def test_every_form(backend64, random_rows, forms, flat):
    rows = random_rows(5, 26, device=backend64.device)
    want = dashpot.geometric_median(rows, start="zero", n_iter=4)
    for grads in forms(rows).values():
        got = dashpot.geometric_median(grads, start="zero", n_iter=4)
        torch.testing.assert_close(flat(got), want)


def test_gradient_holds_the_coefficients(backend64, random_rows):
    rows = random_rows(5, 8, device=backend64.device)
    coeffs, _ = dashpot.geometric_median_coeffs(dashpot.pairwise_sqdist(rows))
    leaf = rows.clone().requires_grad_()
    du = torch.randn(8, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad(dashpot.geometric_median(leaf), leaf, du)
    torch.testing.assert_close(grad, torch.outer(coeffs, du))


def test_errors(random_rows):
    rows = random_rows(5, 8)
    with pytest.raises(ValueError, match="start: expected one of mean, zero, got 'last'"):
        dashpot.geometric_median(rows, start="last")
    with pytest.raises(ValueError, match="nu: expected a finite number > 0, got 0"):
        dashpot.geometric_median(rows, nu=0)
    with pytest.raises(ValueError, match=r"weights: expected \(5,\)"):
        dashpot.geometric_median(rows, weights=torch.ones(5, 1))


@pytest.mark.parametrize("size", [1e3, 1e12, 1e15, 1e20])
def test_bounded_however_loud_the_bad_rows(backend64, random_rows, size):
    """Three of fifteen, in three directions: the point stays among the honest rows, as far as
    squared distances in float64 tell these apart."""
    rows = random_rows(15, 40, device=backend64.device)
    honest = rows[:12].mean(0)
    for i in (12, 13, 14):
        rows[i] = 0
        rows[i, i] = size
    median = dashpot.geometric_median(rows)
    spread = (rows[:12] - honest).norm(dim=1).max()
    resolved = (torch.finfo(torch.float64).eps * size * spread).sqrt()
    assert (median - honest).norm() < spread + resolved
