"""phocas: the rule by itself; its properties are in
test_coordinate_rules.py and test_rules.py."""

from __future__ import annotations

import dashpot
import torch


def test_vector(backend64, spec_rows):
    got = dashpot.phocas(spec_rows(device=backend64.device), 1).cpu()
    want = torch.tensor([1.05, 1.95, 0.05, -1], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_is_the_mean_of_the_values_nearest_the_trimmed_mean(backend64, random_rows):
    rows = random_rows(7, 40, device=backend64.device)
    center = rows.sort(dim=0).values[2:5].mean(0)
    nearest = (rows - center).abs().argsort(dim=0)[:5]
    torch.testing.assert_close(dashpot.phocas(rows, 2), rows.gather(0, nearest).mean(0))
