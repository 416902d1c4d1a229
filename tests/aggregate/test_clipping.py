"""Clipping and AdaptiveClipping: rows shortened before a rule."""

from __future__ import annotations

import dashpot
import pytest
import torch


def test_long_rows_are_shortened(random_rows):
    rows = random_rows(9, 20)
    norm = rows.norm(dim=1, keepdim=True)
    limit = norm.median().item()
    update = dashpot.robust_aggregate(rows, "mean", pre=[dashpot.Clipping(limit)])
    torch.testing.assert_close(update, (rows * (limit / norm).clamp(max=1)).mean(0))


def test_adaptive_clipping_shortens_the_longest(random_rows):
    """f = 2 of 9: the floor(2 * 2 * 7 / 9) = 3 longest rows get the length of the fourth."""
    rows = random_rows(9, 20)
    norm = rows.norm(dim=1, keepdim=True)
    limit = norm.flatten().sort(descending=True).values[3]
    update = dashpot.robust_aggregate(rows, "mean", pre=[dashpot.AdaptiveClipping(2)])
    torch.testing.assert_close(update, (rows * (limit / norm).clamp(max=1)).mean(0))


def test_nothing_is_lengthened(random_rows):
    rows = random_rows(5, 20)
    update = dashpot.robust_aggregate(rows, "mean", pre=[dashpot.Clipping(1e9)])
    torch.testing.assert_close(update, rows.mean(0))


def test_errors():
    with pytest.raises(TypeError, match=r"max_norm: .*got str"):
        dashpot.Clipping("1")
    with pytest.raises(ValueError, match="f: expected at least 0, got -1"):
        dashpot.AdaptiveClipping(-1)
