"""centered_clipping_coeffs: steps on distances, against the steps on vectors."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None]).square().sum(-1)


def by_definition(rows, v, tau, n_iter):
    for _ in range(n_iter):
        gap = rows - v
        v = v + (gap * (tau / gap.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
    return v


@given(p=st.integers(1, 9), seed=st.integers(0, 99), n_iter=st.integers(0, 6), data=st.data())
def test_steps_on_vectors(backend64, random_rows, p, seed, n_iter, data):
    points = random_rows(p + 1, 12, seed)
    tau = data.draw(st.sampled_from([1e-3, 0.5, 3.0, 1e4]))
    coeffs = dashpot.centered_clipping_coeffs(
        distances(points).to(backend64.device), tau, n_iter=n_iter
    )
    want = by_definition(points[:-1], points[-1], tau, n_iter)
    torch.testing.assert_close(coeffs.cpu() @ points, want, rtol=1e-9, atol=1e-9)
    assert coeffs.sum().item() == pytest.approx(1, rel=1e-12)


def test_nothing_is_clipped(backend64, random_rows):
    """A radius beyond all rows: the mean, the centre is forgotten."""
    sqdist = distances(random_rows(6, 12)).to(backend64.device)
    want = torch.tensor([0.2] * 5 + [0.0], dtype=torch.float64)
    torch.testing.assert_close(dashpot.centered_clipping_coeffs(sqdist, 1e3).cpu(), want)


def test_radius_zero_stays(backend64, random_rows):
    sqdist = distances(random_rows(6, 12)).to(backend64.device)
    assert dashpot.centered_clipping_coeffs(sqdist, 0.0, n_iter=3).tolist() == [0] * 5 + [1]


def test_many_workers(backend64, random_rows):
    points = random_rows(100, 12)
    coeffs = dashpot.centered_clipping_coeffs(distances(points).to(backend64.device), 1.0, n_iter=3)
    want = by_definition(points[:-1], points[-1], 1.0, 3)
    torch.testing.assert_close(coeffs.cpu() @ points, want, rtol=1e-9, atol=1e-9)


def test_bad_rows_are_dropped(backend64, random_rows):
    points = random_rows(6, 12, device=backend64.device)
    points[1], points[3, 2] = torch.nan, torch.inf
    kept = [0, 2, 4, 5]
    coeffs = dashpot.centered_clipping_coeffs(dashpot.pairwise_sqdist(points), 1.0)
    want = dashpot.centered_clipping_coeffs(dashpot.pairwise_sqdist(points[kept]), 1.0)
    torch.testing.assert_close(coeffs[kept], want)
    assert not coeffs[[1, 3]].any()
    center = points.clone()
    center[5, 0] = torch.nan
    assert dashpot.centered_clipping_coeffs(dashpot.pairwise_sqdist(center), 1.0).isnan().all()
    points[:5] = torch.nan
    assert dashpot.centered_clipping_coeffs(dashpot.pairwise_sqdist(points), 1.0).isnan().all()


def test_errors():
    with pytest.raises(ValueError, match=r"sqdist: .*q >= 2"):
        dashpot.centered_clipping_coeffs(torch.zeros(1, 1), 1.0)
    with pytest.raises(ValueError, match=r"tau: expected a finite number >= 0, got -1\.0"):
        dashpot.centered_clipping_coeffs(torch.zeros(3, 3), -1.0)
    with pytest.raises(TypeError, match="tau: expected a float, got str"):
        dashpot.centered_clipping_coeffs(torch.zeros(3, 3), "1")
    with pytest.raises(TypeError, match="n_iter: expected an int, got float"):
        dashpot.centered_clipping_coeffs(torch.zeros(3, 3), 1.0, n_iter=1.0)
