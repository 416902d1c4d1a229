"""bulyan_rows: repeated Krum on squared distances."""

from __future__ import annotations

import dashpot
import pytest
import torch


def by_hand(sqdist: torch.Tensor, f: int) -> list[int]:
    """The definition, on lists: the rows in the order in which they are chosen."""
    remaining, chosen = list(range(len(sqdist))), []
    while len(remaining) > 2 * f:
        k = max(1, len(remaining) - f - 2)
        scores = [sum(sorted(sqdist[i, j] for j in remaining if j != i)[:k]) for i in remaining]
        best = remaining[scores.index(min(scores))]
        chosen.append(best)
        remaining.remove(best)
    return chosen


def distances(rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - rows[None, :]).square().sum(-1)


@pytest.mark.parametrize(("p", "f"), [(3, 0), (7, 1), (12, 2), (15, 3), (24, 5)])
def test_definition(backend64, random_rows, p, f):
    """Integers, so that sums are exact and ties are ties."""
    for seed in range(4):
        sqdist = distances((2 * random_rows(p, 6, seed)).round())
        chosen = dashpot.bulyan_rows(sqdist.to(backend64.device), f)
        assert chosen.dtype == torch.bool and chosen.sum() == p - 2 * f
        assert chosen.nonzero().flatten().tolist() == sorted(by_hand(sqdist, f))


def test_the_first_of_equal_rows_is_taken(backend64):
    sqdist = distances(torch.zeros(7, 3, dtype=torch.float64, device=backend64.device))
    assert dashpot.bulyan_rows(sqdist, 1).tolist() == [True] * 5 + [False] * 2


def test_liars_are_left_out(backend64, random_rows):
    rows = torch.randn(15, 50, dtype=torch.float64, device=backend64.device)
    rows[[2, 8, 14]] *= 100  # each elsewhere: three at one place are near each other
    assert not dashpot.bulyan_rows(distances(rows), 3)[[2, 8, 14]].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_come_last(backend64, bad):
    """Up to 2 f of them are left out, although f is what the scores allow for."""
    rows = torch.randn(15, 20, dtype=torch.float64, device=backend64.device)
    rows[[0, 3, 5, 9, 12, 13], 4] = bad
    assert not dashpot.bulyan_rows(distances(rows), 3)[[0, 3, 5, 9, 12, 13]].any()
    rows[:] = bad
    assert dashpot.bulyan_rows(distances(rows), 3).sum() == 9


def test_float32_distances(backend64):
    sqdist = distances(torch.randn(7, 4, device=backend64.device))
    assert torch.equal(dashpot.bulyan_rows(sqdist, 1), dashpot.bulyan_rows(sqdist.double(), 1))


SQUARE = torch.zeros(7, 7, dtype=torch.float64)
BAD = [
    (([0.0], 1), TypeError, r"sqdist: expected a torch.Tensor, got list"),
    ((SQUARE.half(), 1), TypeError, r"sqdist: expected float64 or float32, got torch.float16"),
    ((SQUARE[:6], 1), ValueError, r"sqdist: .*square matrix .*got \(6, 7\)"),
    ((SQUARE, 1.0), TypeError, r"f: expected an int, got float"),
    ((SQUARE, -1), ValueError, r"f: expected f >= 0 and 4 f \+ 3 <= p = 7, got -1"),
    ((SQUARE, 2), ValueError, r"f: expected f >= 0 and 4 f \+ 3 <= p = 7, got 2"),
]


@pytest.mark.parametrize(("args", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(args, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.bulyan_rows(*args)
