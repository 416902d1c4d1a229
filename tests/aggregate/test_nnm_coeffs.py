"""nnm_coeffs: the mixing matrix of nearest-neighbour mixing."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None]).square().sum(-1)


@given(p=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_definition(backend64, random_rows, p, seed, data):
    """The p - f nearest, itself first, then by distance and index."""
    rows = random_rows(p, 12, seed)
    f = data.draw(st.integers(0, p - 1))
    sqdist = distances(rows)
    mixing = dashpot.nnm_coeffs(sqdist.to(backend64.device), f)
    for i in range(p):
        order = sorted(range(p), key=lambda j: (j != i, sqdist[i, j].item(), j))
        want = [1 / (p - f) if j in order[: p - f] else 0 for j in range(p)]
        assert mixing[i].tolist() == want


def test_ties_go_to_itself_then_to_the_lower_index(backend64):
    """Four equal rows."""
    mixing = dashpot.nnm_coeffs(torch.zeros(4, 4, device=backend64.device).double(), 2)
    want = [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5]]
    assert mixing.tolist() == want


@pytest.mark.parametrize("p", [65, 257])
def test_many_workers(backend64, random_rows, p):
    sqdist = distances(random_rows(p, 20))
    mixing = dashpot.nnm_coeffs(sqdist.to(backend64.device), p // 2).cpu()
    nearest = sqdist.argsort(dim=1)[:, : p - p // 2]
    want = torch.zeros(p, p, dtype=torch.float64).scatter_(1, nearest, 1 / (p - p // 2))
    torch.testing.assert_close(mixing, want)


@pytest.mark.parametrize("norms", [True, False])
def test_bad_rows(backend64, random_rows, norms):
    """A bad row is nobody's neighbour; its own mixture is NaN."""
    rows = random_rows(6, 12, device=backend64.device)
    rows[2], rows[5, 0] = torch.nan, torch.inf
    kept = [0, 1, 3, 4]
    mixing = dashpot.nnm_coeffs(dashpot.pairwise_sqdist(rows, norms=norms), 2)
    assert mixing[[2, 5]].isnan().all() and not mixing[kept][:, [2, 5]].any()
    want = dashpot.nnm_coeffs(dashpot.pairwise_sqdist(rows[kept]), 0)
    torch.testing.assert_close(mixing[kept][:, kept], want)
    rows[0] = torch.nan  # more than f: nobody has four good rows
    assert dashpot.nnm_coeffs(dashpot.pairwise_sqdist(rows, norms=norms), 2).isnan().all()


def test_errors():
    with pytest.raises(ValueError, match="f: expected 0 <= f <= 2, got 3"):
        dashpot.nnm_coeffs(torch.zeros(3, 3), 3)
    with pytest.raises(TypeError, match="f: expected an int, got bool"):
        dashpot.nnm_coeffs(torch.zeros(3, 3), True)
    with pytest.raises(ValueError, match=r"sqdist: .*got \(3,\)"):
        dashpot.nnm_coeffs(torch.zeros(3), 1)
