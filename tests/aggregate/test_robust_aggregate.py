"""robust_aggregate: every rule behind one interface, and pre-stages."""

from __future__ import annotations

import pickle

import dashpot
import numpy as np
import pytest
import torch
from dashpot.aggregate._rows import as_rows
from dashpot.aggregate._rules import make_rule
from hypothesis import given
from hypothesis import strategies as st

F2 = {"f": 2}
OPTIONS = {  # each rule, for 11 workers
    "flag": {"m": 3, "output": "rescaled"},
    "krum": F2,
    "multi_krum": {"f": 2, "k": 4},
    "mda": F2,
    "monna": {"f": 2, "idx": 1},
    "geometric_median": {"start": "zero", "n_iter": 5},
    "centered_clipping": {"tau": 2.0, "n_iter": 2},
    "mean": {},
    "coordinate_median": {},
    "trimmed_mean": F2,
    "meamed": F2,
    "phocas": F2,
    "bulyan": F2,
}
FUNCTIONS = {"flag": "flag_aggregate"}


@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_rules_own_function(backend64, random_rows, name):
    rows = random_rows(11, 30, device=backend64.device)
    update = dashpot.robust_aggregate(rows, name, **OPTIONS[name])
    own = getattr(dashpot, FUNCTIONS.get(name, name))
    assert torch.equal(update, own(rows, **OPTIONS[name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_slices_of_the_rows(backend64, random_rows, name):
    """What a distributed caller does: statistics add up, each slice of the update needs its own
    slice of the rows."""
    rows = random_rows(11, 30, device=backend64.device)
    rule = make_rule(name, **OPTIONS[name])
    parts = [part.contiguous() for part in rows.split([7, 20, 3], dim=1)]
    stats = [rule.measure(as_rows(part)) for part in parts]
    total = None if rule.statistic is None else sum(stats)
    solution = rule.solve(total, 11)
    update = torch.cat([rule.apply(part, as_rows(part), solution) for part in parts])
    torch.testing.assert_close(update, rule(rows), rtol=1e-9, atol=1e-9)


STAGES = {
    "nnm": [dashpot.NNM(2)],
    "clipping": [dashpot.Clipping(4.0)],
    "adaptive clipping": [dashpot.AdaptiveClipping(2)],
    "both": [dashpot.AdaptiveClipping(3), dashpot.NNM(2)],
}


def formed(rows: torch.Tensor, pre) -> torch.Tensor:
    """The mixed rows, one stage after the other, from their definitions."""
    for stage in pre:
        p, norm = len(rows), rows.norm(dim=1, keepdim=True)
        if isinstance(stage, dashpot.NNM):
            nearest = torch.cdist(rows, rows).argsort(dim=1)[:, : p - stage.f]
            rows = rows[nearest].mean(1)
        elif isinstance(stage, dashpot.Clipping):
            rows = rows * (stage.max_norm / norm).clamp(max=1)
        else:
            order = norm.flatten().sort().values
            most = order[p - 2 * stage.f * (p - stage.f) // p - 1]
            rows = rows * (most / norm).clamp(max=1)
    return rows


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", OPTIONS)
def test_stages_are_folded(backend64, random_rows, name, stages):
    """No row is mixed, and the update is that of the mixed rows."""
    rows = random_rows(11, 30)
    update = dashpot.robust_aggregate(
        rows.to(backend64.device), name, pre=STAGES[stages], **OPTIONS[name]
    )
    want = dashpot.robust_aggregate(formed(rows, STAGES[stages]), name, **OPTIONS[name])
    torch.testing.assert_close(update.cpu(), want, rtol=1e-7, atol=1e-7)


def test_a_centre_stays_where_it_is(backend64, random_rows):
    points = random_rows(8, 30, device=backend64.device)
    rows, options = points[:7], {"tau": 2.0, "center": points[7], "n_iter": 2}
    update = dashpot.robust_aggregate(rows, "centered_clipping", pre=[dashpot.NNM(2)], **options)
    want = dashpot.centered_clipping(dashpot.nnm(rows, 2) @ rows, **options)
    torch.testing.assert_close(update, want)


def test_close_rows_stay_close(backend, random_rows):
    """Mixed distances come from differences: rows 1e-4 apart beside one 1e4 away, in float32, keep
    their order, where norms and products would leave rounding alone."""
    generator = torch.Generator().manual_seed(0)
    base = 1e3 + torch.randn(400, generator=generator)
    rows = base + 1e-3 * torch.randn(9, 400, generator=generator)
    rows[8] += 1e4
    options = {"f": 2, "k": 1, "pre": [dashpot.NNM(2)]}
    update = dashpot.robust_aggregate(rows.to(backend.device), "multi_krum", **options)
    want = dashpot.robust_aggregate(rows.double(), "multi_krum", **options)
    torch.testing.assert_close(update.cpu().double(), want, rtol=3e-7, atol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_rows_under_mixing(backend64, random_rows, name):
    """A bad row is nobody's neighbour, and its own mixture is dropped in turn. Rules that sort
    coordinates see a row of NaN there."""
    rows = random_rows(11, 30, device=backend64.device)
    rows[2], rows[6, 3] = torch.nan, torch.inf
    aggregate = dashpot.RobustAggregator(name, pre=[dashpot.NNM(2)], **OPTIONS[name])
    assert aggregate(rows).isfinite().all()
    rows[0] = torch.nan  # more than NNM's f
    assert aggregate(rows).isnan().all()


@given(p=st.integers(2, 40), seed=st.integers(0, 99))
def test_any_number_of_workers(random_rows, p, seed):
    """p from 2, f as large as each rule takes."""
    rows = random_rows(p, 9, seed)
    half, krum = (p - 1) // 2, (p - 3) // 2
    options = {"multi_krum": krum, "mda": min(half, 5), "monna": half, "trimmed_mean": half}
    for name, f in options.items():
        if f >= 0:
            assert dashpot.robust_aggregate(rows, name, f=f).isfinite().all()
    for name in ("geometric_median", "mean", "flag", "coordinate_median"):
        assert dashpot.robust_aggregate(rows, name).isfinite().all()


# --------------------------------------------------------------------------------------------
# RobustAggregator


def test_aggregator_keeps_its_rule(random_rows):
    rows = random_rows(11, 30)
    aggregate = dashpot.RobustAggregator("multi_krum", pre=[dashpot.NNM(2)], f=2, k=4)
    want = dashpot.robust_aggregate(rows, "multi_krum", pre=[dashpot.NNM(2)], f=2, k=4)
    assert repr(aggregate) == "RobustAggregator('multi_krum', pre=[NNM(f=2)], f=2, k=4)"
    assert torch.equal(aggregate(rows), want)
    assert torch.equal(pickle.loads(pickle.dumps(aggregate))(rows), want)
    assert repr(dashpot.RobustAggregator()) == "RobustAggregator('flag')"
    back = aggregate(rows.numpy())
    assert isinstance(back, np.ndarray) and np.array_equal(back, want.numpy())


def test_options_are_checked_when_it_is_made():
    make = dashpot.RobustAggregator
    with pytest.raises(ValueError, match=r"rule: expected one of .*krum.*, got 'crumb'"):
        make("crumb")
    with pytest.raises(TypeError, match=r"k: rule 'krum' has the options f, .*, not this one"):
        make("krum", f=1, k=2)
    with pytest.raises(TypeError, match="f: rule 'krum' needs it"):
        make("krum")
    with pytest.raises(ValueError, match="f: expected at least 0, got -1"):
        make("trimmed_mean", f=-1)
    with pytest.raises(ValueError, match="m: expected 1 <= m, got 0"):
        make("flag", m=0)
    with pytest.raises(TypeError, match=r"pre\[1\]: expected NNM, .*got str"):
        make("mean", pre=[dashpot.NNM(1), "nnm"])
    with pytest.raises(ValueError, match="nonfinite: expected 'drop' for rule 'meamed'"):
        make("meamed", f=1, nonfinite="raise")
    with pytest.raises(ValueError, match="weights: expected none where pre-stages mix"):
        make("mean", pre=[dashpot.NNM(1)], weights=torch.ones(3))
    with pytest.raises(TypeError, match="max_norm: expected a float, got str"):
        dashpot.Clipping("1")


def test_what_depends_on_p_is_checked_with_the_mixed_rows(random_rows):
    """5 buckets of 2 are too few for f = 2."""
    rows = random_rows(10, 30)
    dashpot.multi_krum(rows, 2)
    with pytest.raises(ValueError, match=r"f: expected at least 2 f \+ 3 = 7 workers, got p = 5"):
        dashpot.robust_aggregate(rows, "multi_krum", pre=[dashpot.Bucketing(2)], f=2)
    bad = rows.clone()
    bad[4] = torch.nan
    with pytest.raises(ValueError, match=r"workers \[4\]"):
        dashpot.robust_aggregate(bad, "multi_krum", pre=[dashpot.NNM(1)], f=1, nonfinite="raise")
