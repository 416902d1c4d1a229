"""krum: the selected row itself."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers


@given(p=st.integers(3, 9), seed=st.integers(0, 999))
def test_is_one_of_the_rows(backend64, random_rows, p, seed):
    rows = random_rows(p, 12, seed, device=backend64.device)
    f = (p - 3) // 2
    coeffs, scores = dashpot.krum_coeffs(dashpot.pairwise_sqdist(rows), f)
    assert torch.equal(dashpot.krum(rows, f), rows[scores.argmin()])
    assert coeffs.argmax() == scores.argmin()


@pytest.mark.peers
@pytest.mark.parametrize("p", [5, 15, 33])
def test_torchjd(backend64, random_rows, p):
    """Its variant: plain distances, p - f - 2 neighbours."""
    krum = peers.load("torchjd.aggregation").Krum
    for seed in range(5):
        rows = random_rows(p, 40, seed)
        f = (p - 3) // 2
        update = dashpot.krum(rows.to(backend64.device), f, squared=False)
        torch.testing.assert_close(update.cpu(), krum(n_byzantine=f)(rows), rtol=1e-12, atol=0)


@given(seed=st.integers(0, 99))
def test_invariances(backend64, random_rows, seed):
    """Order, translation, rotation of the rows."""
    rows = random_rows(7, 12, seed, device=backend64.device)
    update = dashpot.krum(rows, 2)
    assert torch.equal(dashpot.krum(rows[torch.randperm(7)], 2), update)
    torch.testing.assert_close(dashpot.krum(rows + 3, 2), update + 3)
    turn = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q.to(backend64.device)
    torch.testing.assert_close(dashpot.krum(rows @ turn, 2), update @ turn)


def test_every_form(backend64, random_rows, forms, flat):
    rows = random_rows(5, 26, device=backend64.device)
    for grads in forms(rows).values():
        assert torch.equal(flat(dashpot.krum(grads, 1)), dashpot.krum(rows, 1))


def test_gradient(backend64, random_rows):
    """All of it to the selected worker; exact, as the selection does not move."""
    rows = random_rows(5, 8, device=backend64.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: dashpot.krum(rows, 1), [rows])


def test_errors(random_rows):
    rows = random_rows(5, 8)
    with pytest.raises(ValueError, match="f: expected at least 2 f"):
        dashpot.krum(rows, 2)
    with pytest.raises(TypeError, match=r"grads: .*got str"):
        dashpot.krum("rows", 1)
    with pytest.raises(ValueError, match="nonfinite: expected one of drop, raise, got 'keep'"):
        dashpot.krum(rows, 1, nonfinite="keep")
    rows[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"grads: expected finite rows.*workers \[3\]"):
        dashpot.krum(rows, 1, nonfinite="raise")
