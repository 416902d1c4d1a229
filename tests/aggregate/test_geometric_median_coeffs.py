"""geometric_median_coeffs: Weiszfeld's steps on distances, against the steps on vectors."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None]).square().sum(-1)


def weiszfeld(rows, nu, n_iter, z, weights):
    """The definition, on d-dimensional vectors."""
    for _ in range(n_iter):
        w = weights / (rows - z).norm(dim=1).clamp(min=nu)
        z = (w @ rows) / w.sum()
    return z


@given(p=st.integers(1, 9), seed=st.integers(0, 99), n_iter=st.integers(0, 7), data=st.data())
def test_steps_on_vectors(backend64, random_rows, p, seed, n_iter, data):
    rows = random_rows(p, 12, seed)
    nu = data.draw(st.sampled_from([1e-6, 0.1, 3.0]))
    weights = torch.rand(p, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    coeffs, iters = dashpot.geometric_median_coeffs(
        distances(rows).to(backend64.device), nu=nu, n_iter=n_iter, tol=0.0,
        weights=weights.to(backend64.device),
    )  # fmt: skip
    want = weiszfeld(rows, nu, n_iter, weights @ rows / weights.sum(), weights)
    torch.testing.assert_close(coeffs.cpu() @ rows, want, rtol=1e-9, atol=1e-9)
    assert coeffs.sum().item() == pytest.approx(1, rel=1e-12)
    assert iters.item() <= n_iter


@given(seed=st.integers(0, 99), n_iter=st.integers(0, 4))
def test_from_a_point_of_no_weight(backend64, random_rows, seed, n_iter):
    """start="last": the last point is where it starts."""
    rows, start = random_rows(6, 12, seed), random_rows(1, 12, seed + 1)
    points = torch.cat([rows, start])
    coeffs, _ = dashpot.geometric_median_coeffs(
        distances(points).to(backend64.device), n_iter=n_iter, tol=0.0, start="last"
    )
    want = weiszfeld(rows, 1e-6, n_iter, start[0], torch.ones(6).double())
    torch.testing.assert_close(coeffs.cpu() @ points, want, rtol=1e-9, atol=1e-9)
    assert coeffs[-1].item() == (n_iter == 0)


def test_stops_when_nothing_moves(backend64, random_rows):
    sqdist = distances(random_rows(15, 40)).to(backend64.device)
    coeffs, iters = dashpot.geometric_median_coeffs(sqdist)
    fixed, all_steps = dashpot.geometric_median_coeffs(sqdist, n_iter=500, tol=0.0)
    assert 2 < iters.item() < 100 and iters.item() < all_steps.item()
    torch.testing.assert_close(coeffs, fixed, rtol=0, atol=1e-9)
    assert dashpot.geometric_median_coeffs(sqdist, tol=1e9)[1].item() == 1


def test_coincident_rows(backend64):
    """Most rows are one point: the median is there, at distance 0."""
    rows = torch.tensor([[1.0, 2.0]] * 3 + [[4.0, 6.0], [-7.0, 0.0]]).double()
    coeffs, _ = dashpot.geometric_median_coeffs(distances(rows).to(backend64.device))
    torch.testing.assert_close(coeffs.cpu() @ rows, rows[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", [60, 90, 257])
def test_many_workers(backend64, random_rows, p):
    rows = random_rows(p, 12)
    coeffs, _ = dashpot.geometric_median_coeffs(
        distances(rows).to(backend64.device), n_iter=4, tol=0.0
    )
    want = weiszfeld(rows, 1e-6, 4, rows.mean(0), torch.ones(p).double())
    torch.testing.assert_close(coeffs.cpu() @ rows, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norms", [True, False])
def test_bad_rows_are_dropped(backend64, random_rows, norms):
    rows = random_rows(6, 12, device=backend64.device)
    rows[1], rows[4, 2] = torch.nan, torch.inf
    kept = [0, 2, 3, 5]
    coeffs, _ = dashpot.geometric_median_coeffs(dashpot.pairwise_sqdist(rows, norms=norms))
    want, _ = dashpot.geometric_median_coeffs(dashpot.pairwise_sqdist(rows[kept]))
    torch.testing.assert_close(coeffs[kept], want)
    assert not coeffs[[1, 4]].any()
    rows[kept] = torch.nan
    sqdist = dashpot.pairwise_sqdist(rows, norms=norms)
    assert dashpot.geometric_median_coeffs(sqdist)[0].isnan().all()


@pytest.mark.parametrize("weight", [-1.0, torch.nan, torch.inf])
def test_weights_that_are_none(backend64, random_rows, weight):
    sqdist = distances(random_rows(4, 12)).to(backend64.device)
    weights = torch.tensor([1.0, weight, 1.0, 1.0], device=backend64.device)
    assert dashpot.geometric_median_coeffs(sqdist, weights=weights)[0].isnan().all()
    zeros = torch.zeros(4, device=backend64.device)
    assert dashpot.geometric_median_coeffs(sqdist, weights=zeros)[0].isnan().all()
    one = torch.tensor([0, 0, 2, 0], device=backend64.device)
    assert dashpot.geometric_median_coeffs(sqdist, weights=one)[0].tolist() == [0, 0, 1, 0]


def test_errors():
    sqdist = torch.zeros(3, 3)
    for option, value, match in [
        ("nu", 0.0, "nu: expected a finite number > 0, got 0.0"),
        ("nu", torch.nan, "nu: expected a finite number > 0, got nan"),
        ("n_iter", -1, "n_iter: expected at least 0, got -1"),
        ("tol", -1e-3, "tol: expected a finite number >= 0"),
        ("start", "zero", "start: expected one of mean, last, got 'zero'"),
        ("weights", torch.ones(2), r"weights: expected \(3,\).*got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=match):
            dashpot.geometric_median_coeffs(sqdist, **{option: value})
    with pytest.raises(ValueError, match=r"weights: expected \(2,\)"):
        dashpot.geometric_median_coeffs(sqdist, start="last", weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"weights: .*Tensor.*got list"):
        dashpot.geometric_median_coeffs(sqdist, weights=[1, 1, 1])
    with pytest.raises(TypeError, match="n_iter: expected an int, got float"):
        dashpot.geometric_median_coeffs(sqdist, n_iter=3.0)
