"""mda: the mean of the subset of least diameter."""

from __future__ import annotations

import itertools

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def by_enumeration(rows: torch.Tensor, f: int) -> torch.Tensor:
    distance = (rows[:, None] - rows[None]).norm(dim=-1)
    subsets = itertools.combinations(range(len(rows)), len(rows) - f)
    best = min(subsets, key=lambda subset: distance[list(subset)][:, list(subset)].max().item())
    return rows[list(best)].mean(0)


def test_vector(backend64, spec_rows):
    update = dashpot.mda(spec_rows(device=backend64.device), 1)
    torch.testing.assert_close(update.tolist(), [1.05, 1.95, 0.05, -1.0], rtol=0, atol=1e-12)


@given(p=st.integers(2, 8), seed=st.integers(0, 99), data=st.data())
def test_enumeration(backend64, random_rows, p, seed, data):
    f = data.draw(st.integers(0, (p - 1) // 2))
    rows = random_rows(p, 12, seed)
    update = dashpot.mda(rows.to(backend64.device), f)
    torch.testing.assert_close(update.cpu(), by_enumeration(rows, f))


@given(seed=st.integers(0, 99))
def test_moves_with_the_space(backend64, random_rows, seed):
    rows = random_rows(7, 12, seed, device=backend64.device)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q.to(backend64.device)
    update = dashpot.mda(rows, 2)
    torch.testing.assert_close(dashpot.mda(rows @ turn + 1, 2), update @ turn + 1)


@given(seed=st.integers(0, 99))
def test_workers_have_no_order(backend64, random_rows, seed):
    """Several subsets may have the least diameter, and the first is taken: the diameter stays."""
    sqdist = dashpot.pairwise_sqdist(random_rows(9, 12, seed, device=backend64.device))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = sqdist[order][:, order].contiguous()
    assert torch.equal(dashpot.mda_coeffs(moved, 3)[1], dashpot.mda_coeffs(sqdist, 3)[1])


def test_bad_rows(backend, random_rows):
    rows = random_rows(8, 34, dtype=torch.float32, device=backend.device)
    kept = rows[[0, 1, 2, 4, 5, 7]].clone()
    rows[3], rows[6, 1] = torch.nan, torch.inf
    torch.testing.assert_close(dashpot.mda(rows, 3), dashpot.mda(kept, 1), rtol=1e-6, atol=1e-6)
    assert dashpot.mda(rows, 1).isnan().all()


def test_gradient(backend64, random_rows):
    rows = random_rows(5, 8, device=backend64.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: dashpot.mda(rows, 2), [rows])


def test_errors(random_rows):
    with pytest.raises(ValueError, match="f: expected 2 f < p = 4, got 2"):
        dashpot.mda(random_rows(4, 8), 2)
    with pytest.raises(ValueError, match="f: expected at most 32, got 40"):
        dashpot.mda(random_rows(90, 8), 40)
