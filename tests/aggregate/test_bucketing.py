"""bucketing and Bucketing: means of random groups of rows."""

from __future__ import annotations

import dashpot
import pytest
import torch


@pytest.mark.parametrize("name", ["multi_krum", "flag", "trimmed_mean"])
def test_buckets(random_rows, name):
    """The matrix of the same generator, and 6 rows where 11 were."""
    rows = random_rows(11, 30)
    options = {"m": 3} if name == "flag" else {"f": 1}
    mixing = dashpot.bucketing(rows, 2, torch.Generator().manual_seed(5))
    stage = dashpot.Bucketing(2, torch.Generator().manual_seed(5))
    update = dashpot.robust_aggregate(rows, name, pre=[stage], **options)
    want = dashpot.robust_aggregate(mixing @ rows, name, **options)
    torch.testing.assert_close(update, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("p", "s"), [(1, 1), (7, 2), (9, 3), (5, 8)])
def test_every_row_is_in_one_bucket(random_rows, p, s):
    """Each row has weight 1 / size in its bucket and none elsewhere; only the last is smaller."""
    mixing = dashpot.bucketing(random_rows(p, 6), s)
    assert mixing.shape == (-(-p // s), p) and mixing.dtype == torch.float64
    members = mixing > 0
    assert members.sum(0).tolist() == [1] * p
    assert members.sum(1)[:-1].tolist() == [s] * (-(-p // s) - 1)
    torch.testing.assert_close(mixing.sum(1), torch.ones(len(mixing)).double())


def test_the_order_is_the_generators(random_rows):
    rows = random_rows(20, 6)
    first, again, other = (
        dashpot.bucketing(rows, 2, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_errors(random_rows):
    with pytest.raises(ValueError, match="s: expected at least 1, got 0"):
        dashpot.bucketing(random_rows(4, 6), 0)
    with pytest.raises(TypeError, match=r"generator: .*got int"):
        dashpot.Bucketing(2, generator=3)
