"""mean: the average of the rows that are finite."""

from __future__ import annotations

import dashpot
import pytest
import torch


def test_is_the_mean(backend64, random_rows, forms, flat):
    rows = random_rows(6, 26, device=backend64.device)
    for grads in forms(rows).values():
        torch.testing.assert_close(flat(dashpot.mean(grads)), rows.mean(0))


def test_weights(backend64, random_rows):
    rows = random_rows(4, 26, device=backend64.device)
    weights = torch.tensor([1, 0, 5, 2], device=backend64.device)
    want = (rows[0] + 5 * rows[2] + 2 * rows[3]) / 8
    torch.testing.assert_close(dashpot.mean(rows, weights), want)
    for none in ([1.0, -1, 1, 1], [1.0, torch.nan, 1, 1], [0.0, 0, 0, 0]):
        bad = torch.tensor(none, device=backend64.device)
        assert dashpot.mean(rows, bad).isnan().all()


def test_bad_rows(backend, random_rows):
    rows = random_rows(5, 34, dtype=torch.float32, device=backend.device)
    rows[1], rows[3, 2] = torch.nan, torch.inf
    torch.testing.assert_close(dashpot.mean(rows), rows[[0, 2, 4]].mean(0))
    with pytest.raises(ValueError, match=r"workers \[1, 3\]"):
        dashpot.mean(rows, nonfinite="raise")
    rows[:] = torch.nan
    assert dashpot.mean(rows).isnan().all()


def test_gradient(backend64, random_rows):
    rows = random_rows(5, 8, device=backend64.device).requires_grad_()
    weights = torch.arange(5, device=backend64.device)
    assert torch.autograd.gradcheck(lambda rows: dashpot.mean(rows, weights), [rows])


def test_errors(random_rows):
    with pytest.raises(ValueError, match=r"weights: expected \(5,\).*got \(4,\)"):
        dashpot.mean(random_rows(5, 8), torch.ones(4))
