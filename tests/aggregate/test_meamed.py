"""meamed: the rule by itself; its properties are in
test_coordinate_rules.py and test_rules.py."""

from __future__ import annotations

import dashpot
import pytest
import torch

from bench import peers


def test_vector(backend64, spec_rows):
    got = dashpot.meamed(spec_rows(device=backend64.device), 1).cpu()
    want = torch.tensor([1.05, 1.95, 0.05, -1], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_is_the_mean_of_the_values_nearest_the_median(backend64, random_rows):
    rows = random_rows(7, 40, device=backend64.device)
    center = rows.sort(dim=0).values[3]
    nearest = (rows - center).abs().argsort(dim=0)[:5]
    torch.testing.assert_close(dashpot.meamed(rows, 2), rows.gather(0, nearest).mean(0))


@pytest.mark.peers
@pytest.mark.parametrize(("p", "f"), [(5, 1), (8, 3), (15, 3), (30, 14)])
def test_agrees_with_byzfl(random_rows, p, f):
    """NumPy arrays, which byzfl leaves in float64; it would cast tensors to float32."""
    rows = random_rows(p, 200)
    want = torch.from_numpy(peers.load("byzfl").Meamed(f=f)(rows.numpy()))
    torch.testing.assert_close(dashpot.meamed(rows, f), want, rtol=1e-10, atol=1e-10)
