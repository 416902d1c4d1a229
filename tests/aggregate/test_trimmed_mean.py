"""trimmed_mean: the rule by itself; its properties are in
test_coordinate_rules.py and test_rules.py."""

from __future__ import annotations

import dashpot
import pytest
import torch

from bench import peers


def test_vector(backend64, spec_rows):
    got = dashpot.trimmed_mean(spec_rows(device=backend64.device), 1).cpu()
    want = torch.tensor([1, 1.9, 0.1, -2.9 / 3], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


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
