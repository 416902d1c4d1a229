"""phocas: the rule by itself; its properties are in test_coordinate_rules.py."""

from __future__ import annotations

import dashpot
import pytest
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


def test_nothing_left_out_is_the_mean(backend64, random_rows):
    rows = random_rows(6, 33, device=backend64.device)
    torch.testing.assert_close(dashpot.phocas(rows, 0), rows.mean(0), rtol=1e-13, atol=1e-13)


def test_out(backend, random_rows):
    rows = random_rows(5, 26, dtype=torch.float32, device=backend.device)
    out = torch.empty_like(rows[0])
    assert dashpot.phocas(rows, 1, out=out) is out
    assert torch.equal(out, dashpot.phocas(rows, 1))


def test_errors():
    rows = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"f: expected 0 <= 2 f < p = 4, got 2"):
        dashpot.phocas(rows, 2)
    with pytest.raises(TypeError, match=r"f: expected an int, got NoneType"):
        dashpot.phocas(rows, None)
