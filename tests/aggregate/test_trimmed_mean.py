"""trimmed_mean: the rule by itself; its properties are in test_coordinate_rules.py."""

from __future__ import annotations

import dashpot
import pytest
import torch

from bench import peers


def test_vector(backend64, spec_rows):
    got = dashpot.trimmed_mean(spec_rows(device=backend64.device), 1).cpu()
    want = torch.tensor([1, 1.9, 0.1, -2.9 / 3], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [1, 6, 40])
def test_nothing_trimmed_is_the_mean(backend64, random_rows, p):
    rows = random_rows(p, 33, device=backend64.device)
    torch.testing.assert_close(dashpot.trimmed_mean(rows, 0), rows.mean(0), rtol=1e-13, atol=1e-13)


def test_all_but_one_trimmed_is_the_median(backend, random_rows):
    rows = random_rows(9, 33, dtype=torch.float32, device=backend.device)
    assert torch.equal(dashpot.trimmed_mean(rows, 4), dashpot.coordinate_median(rows))


@pytest.mark.peers
@pytest.mark.parametrize(("p", "f"), [(5, 1), (8, 3), (15, 3), (30, 14)])
def test_agrees_with_byzfl_and_torchjd(random_rows, p, f):
    """byzfl leaves NumPy arrays in float64; it would cast tensors to float32."""
    rows = random_rows(p, 200)
    got = dashpot.trimmed_mean(rows, f)
    want = torch.from_numpy(peers.load("byzfl").TrMean(f=f)(rows.numpy()))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    want = peers.load("torchjd.aggregation").TrimmedMean(f)(rows)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_out(backend, random_rows):
    rows = random_rows(5, 26, dtype=torch.float32, device=backend.device)
    out = torch.empty_like(rows[0])
    assert dashpot.trimmed_mean(rows, 1, out=out) is out
    assert torch.equal(out, dashpot.trimmed_mean(rows, 1))


def test_errors():
    rows = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"f: expected 0 <= 2 f < p = 4, got 2"):
        dashpot.trimmed_mean(rows, 2)
    with pytest.raises(TypeError, match=r"f: expected an int, got float"):
        dashpot.trimmed_mean(rows, 0.25)
    with pytest.raises(ValueError, match=r"out: .*\(2,\).*got \(3,\)"):
        dashpot.trimmed_mean(rows, 1, out=torch.ones(3))
