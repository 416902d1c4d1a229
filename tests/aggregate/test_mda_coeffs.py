"""mda_coeffs: the exact subset of least diameter, against enumeration."""

from __future__ import annotations

import itertools

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None]).square().sum(-1)


def enumerated(sqdist: torch.Tensor, f: int) -> tuple[float, tuple[int, ...]]:
    """The first subset of least diameter; inf if every one holds a bad row."""
    p = len(sqdist)
    best = (torch.inf, ())
    table = torch.where(sqdist.isfinite(), sqdist, torch.inf).tolist()
    for subset in itertools.combinations(range(p), p - f):
        bad = any(not sqdist[i, i].isfinite() for i in subset)
        pairs = itertools.combinations(subset, 2)
        worst = torch.inf if bad else max((table[i][j] for i, j in pairs), default=0.0)
        if worst < best[0]:
            best = (worst, subset)
    return best


def check(coeffs, diameter, sqdist, f):
    worst, subset = enumerated(sqdist, f)
    if worst == torch.inf:
        assert coeffs.isnan().all() and diameter.isnan()
        return
    assert coeffs.nonzero().flatten().tolist() == list(subset)
    assert coeffs[list(subset)].tolist() == [1 / len(subset)] * len(subset)
    assert diameter.item() == pytest.approx(worst**0.5, rel=1e-15)


@given(p=st.integers(1, 10), seed=st.integers(0, 999), ties=st.booleans(), data=st.data())
def test_every_subset(backend64, p, seed, ties, data):
    """Small integers: many equal distances, so that the order of the subsets decides."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(p, 3, generator=generator).double()
    if ties:
        rows = (2 * rows).round()
    f = data.draw(st.integers(0, (p - 1) // 2))
    sqdist = distances(rows)
    check(*dashpot.mda_coeffs(sqdist.to(backend64.device), f), sqdist, f)


@given(p=st.integers(3, 9), seed=st.integers(0, 999), bad=st.integers(1, 4), data=st.data())
def test_bad_rows_are_left_out_first(backend64, random_rows, p, seed, bad, data):
    """As p - b rows with f - b; NaN if there are more than f."""
    f = data.draw(st.integers(0, (p - 1) // 2))
    rows = random_rows(p, 5, seed)
    rows[torch.randperm(p)[:bad], 1] = torch.nan
    sqdist = dashpot.pairwise_sqdist(rows.to(backend64.device))
    check(*dashpot.mda_coeffs(sqdist, f), sqdist.cpu(), f)


@pytest.mark.backends("kernels")
@pytest.mark.parametrize(("p", "f"), [(15, 7), (60, 5), (65, 32), (100, 12), (257, 8)])
def test_a_planted_cluster_among_many(backend, p, f):
    """More subsets than can be enumerated, words of 64 rows and beyond: f rows far away in turns,
    one of which is nearer than the cluster is wide and so may come in."""
    generator = torch.Generator().manual_seed(p)
    rows = torch.randn(p, 8, generator=generator).double()
    far = torch.randperm(p, generator=generator)[:f]
    rows[far] += 100.0 * torch.arange(1, f + 1)[:, None]
    coeffs, diameter = dashpot.mda_coeffs(distances(rows).to(backend.device), f)
    assert (coeffs == 0).nonzero().flatten().tolist() == far.sort().values.tolist()
    near = [i for i in range(p) if i not in far]
    assert diameter.item() == pytest.approx(distances(rows[near]).max().item() ** 0.5)


@pytest.mark.backends("kernels")
def test_no_structure_at_all(backend):
    """The search has to branch; what it finds keeps f, and no row outside could replace one."""
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double()
    sqdist = distances(rows)
    coeffs, diameter = dashpot.mda_coeffs(sqdist.to(backend.device), 12)
    kept = coeffs.nonzero().flatten().tolist()
    assert len(kept) == 28 and sqdist[kept][:, kept].max().sqrt() == diameter
    outside = [i for i in range(40) if i not in kept]
    for i, j in itertools.product(kept, outside):
        swapped = [r for r in kept if r != i] + [j]
        assert sqdist[swapped][:, swapped].max().sqrt() >= diameter


def test_errors():
    with pytest.raises(ValueError, match="f: expected 2 f < p = 4, got 2"):
        dashpot.mda_coeffs(torch.zeros(4, 4), 2)
    with pytest.raises(ValueError, match=r"f: expected at most 32, got 33.*1\.47\^f"):
        dashpot.mda_coeffs(torch.zeros(99, 99), 33)
    with pytest.raises(TypeError, match="f: expected an int, got str"):
        dashpot.mda_coeffs(torch.zeros(4, 4), "1")
    with (
        dashpot.backend("reference"),
        pytest.raises(ValueError, match=r"f: the reference .* enumerates .*p = 60, f = 20"),
    ):
        dashpot.mda_coeffs(torch.zeros(60, 60), 20)
