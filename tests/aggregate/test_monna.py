"""monna: the mean of the rows nearest to a trusted one."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


@given(p=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_definition(backend64, random_rows, p, seed, data):
    f = data.draw(st.integers(0, (p - 1) // 2))
    idx = data.draw(st.integers(0, p - 1))
    rows = random_rows(p, 12, seed)
    nearest = (rows - rows[idx]).norm(dim=1).argsort()[: p - f]
    update = dashpot.monna(rows.to(backend64.device), f, idx)
    torch.testing.assert_close(update.cpu(), rows[nearest].mean(0))


def test_default_is_worker_0(backend64, random_rows):
    rows = random_rows(7, 12, device=backend64.device)
    assert torch.equal(dashpot.monna(rows, 2), dashpot.monna(rows, 2, 0))
    assert not torch.equal(dashpot.monna(rows, 2), dashpot.monna(rows, 2, 6))


def test_bad_rows(backend, random_rows):
    """Left out; but the trusted one cannot be, and no more than f."""
    rows = random_rows(7, 34, dtype=torch.float32, device=backend.device)
    kept = rows[[0, 1, 3, 4, 6]].clone()
    rows[2], rows[5, 3] = torch.nan, torch.inf
    want = dashpot.monna(kept, 0, 1)
    torch.testing.assert_close(dashpot.monna(rows, 2, 1), want, rtol=1e-6, atol=1e-6)
    assert dashpot.monna(rows, 2, 5).isnan().all()
    assert dashpot.monna(rows, 1, 1).isnan().all()


def test_gradient(backend64, random_rows):
    rows = random_rows(5, 8, device=backend64.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: dashpot.monna(rows, 2, 1), [rows])


def test_errors(random_rows):
    rows = random_rows(5, 8)
    with pytest.raises(ValueError, match="f: expected 2 f < p = 5, got 3"):
        dashpot.monna(rows, 3)
    with pytest.raises(ValueError, match="idx: expected 0 <= idx <= 4, got 5"):
        dashpot.monna(rows, 1, 5)
    with pytest.raises(TypeError, match="idx: expected an int, got str"):
        dashpot.monna(rows, 1, "0")
