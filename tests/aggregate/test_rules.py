"""What holds for every rule behind the one interface, and for those that leave out f values."""

from __future__ import annotations

import dashpot
import pytest
import torch
from dashpot.aggregate._rules import RULES, make_rule
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.tests_op("robust_aggregate")

P = 15
F3 = {"f": 3}
OPTIONS = {  # each rule for 15 workers. f = 3: Bulyan's last choice is then no tie
    "flag": {"lam": 2.0, "n_iter": 2, "output": "rescaled"},
    "krum": F3,
    "multi_krum": F3,
    "mda": F3,
    "monna": F3,
    "geometric_median": {},
    "centered_clipping": {"tau": 2.0, "n_iter": 2},
    "mean": {},
    "coordinate_median": {},
    "trimmed_mean": F3,
    "meamed": F3,
    "phocas": F3,
    "bulyan": F3,
}
BY_COORDINATE = ("coordinate_median", "trimmed_mean", "meamed", "phocas", "bulyan")
FROM_THE_ORIGIN = ("flag", "centered_clipping")  # those that look at the rows from there
TRIMMING = ("trimmed_mean", "meamed", "phocas")
CLOSE = {"rtol": 1e-7, "atol": 1e-7}
FEW = settings(max_examples=6)  # of each of 13 rules on each backend


def test_every_rule_is_here():
    assert set(OPTIONS) == set(RULES)


# --------------------------------------------------------------------------------------------
# Symmetries


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "mda"])
@FEW
@given(seed=st.integers(0, 999))
def test_workers_have_no_order(backend64, random_rows, name, seed):
    """MoNNA's trusted worker is told by its index, and moves along. Of subsets of one diameter MDA
    takes the first: its own test is in test_mda.py."""
    rule = make_rule(name, **OPTIONS[name])
    rows = random_rows(P, 20, seed, device=backend64.device)
    order = torch.randperm(P, generator=torch.Generator().manual_seed(seed))
    moved = rule
    if name == "monna":
        moved = make_rule(name, idx=order.tolist().index(0), **OPTIONS[name])
    torch.testing.assert_close(moved(rows[order]), rule(rows), **CLOSE)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in BY_COORDINATE])
@FEW
@given(seed=st.integers(0, 999))
def test_turns_with_the_space(backend64, random_rows, name, seed):
    rule = make_rule(name, **OPTIONS[name])
    rows = random_rows(P, 20, seed, device=backend64.device)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    turn = turn.to(rows.device)
    torch.testing.assert_close(rule(rows @ turn), rule(rows) @ turn, **CLOSE)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in FROM_THE_ORIGIN])
@FEW
@given(seed=st.integers(0, 999), far=st.floats(-100, 100))
def test_moves_with_the_space(backend64, random_rows, name, seed, far):
    rule = make_rule(name, **OPTIONS[name])
    rows = random_rows(P, 20, seed, device=backend64.device)
    shift = far * random_rows(1, 20, seed + 1, device=backend64.device)[0]
    torch.testing.assert_close(rule(rows + shift), rule(rows) + shift, **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
@FEW
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_grows_with_the_rows(backend64, random_rows, name, seed, scale):
    """All lengths the rule is told in grow too."""
    longer = dict(OPTIONS[name])
    if "tau" in longer:
        longer["tau"] *= scale
    elif name == "geometric_median":
        longer["nu"] = 1e-6 * scale
    rows = random_rows(P, 20, seed, device=backend64.device)
    update = make_rule(name, **longer)(scale * rows)
    want = scale * make_rule(name, **OPTIONS[name])(rows)
    torch.testing.assert_close(update, want, rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("name", [*TRIMMING, "multi_krum", "mda", "monna", "bulyan"])
@FEW
@given(p=st.integers(3, 20), seed=st.integers(0, 999))
def test_nobody_left_out_is_the_mean(backend64, random_rows, name, p, seed):
    rows = random_rows(p, 33, seed, device=backend64.device)
    update = dashpot.robust_aggregate(rows, name, f=0)
    torch.testing.assert_close(update, rows.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.backends("native")
@pytest.mark.parametrize("name", OPTIONS)
def test_256_workers(backend64, random_rows, name):
    """As the reference has it (MDA's enumerates subsets, so f = 1); bad ones stay out."""
    rows = random_rows(256, 70, device=backend64.device)
    rule = make_rule(name, **({"f": 1} if name == "mda" else OPTIONS[name]))
    with dashpot.backend("reference"):
        want = rule(rows)
    torch.testing.assert_close(rule(rows), want, **CLOSE)
    if "f" in OPTIONS[name]:
        rows[5], rows[77, 3], rows[200] = torch.nan, torch.inf, 1e9
        assert make_rule(name, **OPTIONS[name])(rows).abs().max() < 10


# --------------------------------------------------------------------------------------------
# The rules that leave out f values of each coordinate


@pytest.mark.parametrize("name", TRIMMING)
def test_out(backend, random_rows, name):
    rows = random_rows(5, 26, dtype=torch.float32, device=backend.device)
    out = torch.empty_like(rows[0])
    rule = getattr(dashpot, name)
    assert rule(rows, 1, out=out) is out
    assert torch.equal(out, rule(rows, 1))


@pytest.mark.parametrize("name", TRIMMING)
def test_errors(name):
    rows, rule = torch.ones(4, 2), getattr(dashpot, name)
    with pytest.raises(ValueError, match=r"f: expected 0 <= 2 f < p = 4, got 2"):
        rule(rows, 2)
    with pytest.raises(TypeError, match=r"f: expected an int, got float"):
        rule(rows, 0.25)
    with pytest.raises(TypeError, match=r"f: expected an int, got NoneType"):
        rule(rows, None)
    with pytest.raises(ValueError, match=r"out: .*\(2,\).*got \(3,\)"):
        rule(rows, 1, out=torch.ones(3))
