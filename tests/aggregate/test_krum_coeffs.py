"""krum_coeffs: scores, selection and what bad rows do to them."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None]).square().sum(-1)


def by_definition(rows: torch.Tensor, k: int, neighbours: int, squared: bool):
    """Scores and the k least, one worker at a time."""
    distance = distances(rows) if squared else distances(rows).sqrt()
    scores = []
    for i in range(len(rows)):
        others = [distance[i, j].item() for j in range(len(rows)) if j != i]
        scores.append(sum(sorted(others)[:neighbours]))
    return scores, sorted(range(len(rows)), key=lambda i: (scores[i], i))[:k]


def test_scores_of_the_specification(backend64, spec_rows):
    """In tenths the rows are integers, so equal scores are equal: 0 and 3 tie, 0 comes first."""
    rows = (10 * spec_rows(device=backend64.device)).round()
    coeffs, scores = dashpot.krum_coeffs(distances(rows), 1)
    assert scores.tolist() == [10, 14, 22, 10, 8516]
    assert coeffs.tolist() == [1, 0, 0, 0, 0]
    assert dashpot.krum_coeffs(distances(rows), 1, k=2)[0].tolist() == [0.5, 0, 0, 0.5, 0]
    assert dashpot.krum_coeffs(distances(rows), 1, k=None)[0].tolist() == [0.25] * 4 + [0]


@given(p=st.integers(2, 9), seed=st.integers(0, 999), squared=st.booleans(), data=st.data())
def test_definition(backend64, random_rows, p, seed, squared, data):
    rows = random_rows(p, 12, seed)
    k = data.draw(st.integers(1, p))
    neighbours = data.draw(st.integers(1, p - 1))
    sqdist = distances(rows).to(backend64.device)
    coeffs, scores = dashpot.krum_coeffs(sqdist, 0, k=k, neighbours=neighbours, squared=squared)
    want, chosen = by_definition(rows, k, neighbours, squared)
    torch.testing.assert_close(scores.tolist(), want, rtol=1e-12, atol=0)
    assert coeffs.nonzero().flatten().tolist() == sorted(chosen)
    assert coeffs[chosen].tolist() == [1 / k] * k


@pytest.mark.parametrize("p", [64, 65, 257])
def test_many_workers(backend64, random_rows, p):
    rows = random_rows(p, 20)
    coeffs, scores = dashpot.krum_coeffs(distances(rows).to(backend64.device), p // 4, k=5)
    want, chosen = by_definition(rows, 5, p - p // 4 - 2, True)
    torch.testing.assert_close(scores.tolist(), want, rtol=1e-12, atol=0)
    assert coeffs.nonzero().flatten().tolist() == sorted(chosen)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_are_as_if_never_there(backend64, random_rows, bad, norms):
    """b <= f bad rows: the same as p - b rows with f - b, whatever stands on the diagonal."""
    rows = random_rows(9, 12)
    kept = [0, 2, 3, 4, 6, 7, 8]
    want, _ = dashpot.krum_coeffs(distances(rows[kept]), 0, k=3)
    rows[1], rows[5, 3] = bad, bad
    sqdist = dashpot.pairwise_sqdist(rows.to(backend64.device), norms=norms)
    coeffs, scores = dashpot.krum_coeffs(sqdist, 2, k=3)
    torch.testing.assert_close(coeffs[kept].cpu(), want)
    assert not coeffs[[1, 5]].any() and scores[[1, 5]].isinf().all()


def test_more_bad_rows_than_it_bears(backend64, random_rows):
    """p = 7, f = 2: a score needs 3 neighbours. With 3 bad rows the 4 others still have them, with
    4 bad rows none has."""
    rows = random_rows(7, 12, device=backend64.device)
    rows[:3] = torch.nan
    coeffs, scores = dashpot.krum_coeffs(dashpot.pairwise_sqdist(rows), 2)
    assert coeffs.isfinite().all() and scores[3:].isfinite().all()
    assert dashpot.krum_coeffs(dashpot.pairwise_sqdist(rows), 2, k=5)[0].isnan().all()
    rows[3] = torch.nan
    coeffs, scores = dashpot.krum_coeffs(dashpot.pairwise_sqdist(rows), 2)
    assert coeffs.isnan().all() and scores.isinf().all()


def test_distances_beyond_float64(backend64):
    """Finite rows too far apart: their distance counts as inf, not as NaN."""
    sqdist = torch.tensor([[0, 1, 2, torch.inf], [1, 0, 3, 9], [2, 3, 0, 9], [torch.inf, 9, 9, 0]])
    coeffs, scores = dashpot.krum_coeffs(sqdist.double().to(backend64.device), 0, neighbours=3)
    assert scores.tolist() == [torch.inf, 13, 14, torch.inf]
    assert coeffs.tolist() == [0, 1, 0, 0]


def test_float32_and_strides(backend64, random_rows):
    sqdist = distances(random_rows(5, 12)).to(backend64.device)
    want, scores = dashpot.krum_coeffs(sqdist, 1)
    wide = torch.stack([sqdist, sqdist + 1], dim=-1)[..., 0]
    assert torch.equal(dashpot.krum_coeffs(wide, 1)[1], scores)
    coeffs, narrow = dashpot.krum_coeffs(sqdist.float(), 1)
    assert coeffs.dtype == narrow.dtype == torch.float64 and torch.equal(coeffs, want)


def test_errors():
    sqdist = torch.zeros(7, 7)
    with pytest.raises(TypeError, match=r"sqdist: .*Tensor.*got list"):
        dashpot.krum_coeffs([[0.0]], 1)
    with pytest.raises(ValueError, match=r"sqdist: .*\(p, p\).*got \(7, 6\)"):
        dashpot.krum_coeffs(sqdist[:, :6], 1)
    with pytest.raises(TypeError, match=r"sqdist: .*float32.*got torch.float16"):
        dashpot.krum_coeffs(sqdist.half(), 1)
    with pytest.raises(TypeError, match="f: expected an int, got float"):
        dashpot.krum_coeffs(sqdist, 1.0)
    with pytest.raises(ValueError, match="f: expected at least 0, got -1"):
        dashpot.krum_coeffs(sqdist, -1)
    with pytest.raises(ValueError, match=r"f: expected at least 2 f \+ 3 = 9 workers, got p = 7"):
        dashpot.krum_coeffs(sqdist, 3)
    with pytest.raises(ValueError, match=r"f: expected at least 2 f \+ 1 = 9 workers, got p = 7"):
        dashpot.krum_coeffs(sqdist, 4, neighbours=2)
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 7, got 8"):
        dashpot.krum_coeffs(sqdist, 1, k=8)
    with pytest.raises(ValueError, match="neighbours: expected 1 <= neighbours <= 6, got 7"):
        dashpot.krum_coeffs(sqdist, 1, neighbours=7)
    with pytest.raises(TypeError, match="squared: expected a bool, got int"):
        dashpot.krum_coeffs(sqdist, 1, squared=1)
