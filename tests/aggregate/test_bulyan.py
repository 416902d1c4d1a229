"""bulyan: pairwise_sqdist, bulyan_rows, then meamed among the chosen rows."""

from __future__ import annotations

import dashpot
import pytest
import torch


def second_stage(rows: torch.Tensor, f: int) -> torch.Tensor:
    """Mean of the p - 4 f values nearest the median, on the chosen rows (p - 2 f, d)."""
    keep = len(rows) - 2 * f
    nearest = (rows - rows.quantile(0.5, dim=0)).abs().argsort(dim=0, stable=True)[:keep]
    return rows.gather(0, nearest).mean(0)


@pytest.mark.parametrize(("p", "f"), [(3, 0), (7, 1), (15, 3), (16, 3), (23, 5)])
def test_is_its_three_steps(backend64, random_rows, p, f):
    rows = random_rows(p, 60, device=backend64.device)
    chosen = dashpot.bulyan_rows(dashpot.pairwise_sqdist(rows), f)
    torch.testing.assert_close(dashpot.bulyan(rows, f), second_stage(rows[chosen], f))


def test_liars_do_not_move_it(backend, random_rows):
    rows = 1 + 0.1 * torch.randn(15, 500, device=backend.device)
    rows[[1, 6, 11]] = torch.tensor([-1e6, torch.inf, torch.nan], device=backend.device)[:, None]
    update = dashpot.bulyan(rows, 3)
    assert (update - 1).abs().max() < 0.3


def test_workers_have_no_order(backend64, random_rows):
    rows = random_rows(11, 40, device=backend64.device)
    moved = dashpot.bulyan(rows[torch.randperm(11)], 2)
    torch.testing.assert_close(moved, dashpot.bulyan(rows, 2), rtol=1e-12, atol=1e-12)


def test_every_form_gives_the_same(backend64, random_rows, forms, flat):
    rows = random_rows(7, 26, device=backend64.device)
    want = dashpot.bulyan(rows, 1)
    for grads in forms(rows).values():
        torch.testing.assert_close(flat(dashpot.bulyan(grads, 1)), want, rtol=1e-13, atol=1e-13)


def test_parameters_of_mixed_dtypes_are_chosen_together(backend, random_rows):
    """One choice of rows over all parameters."""
    rows = random_rows(7, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:10].half(), row[10:].clone()] for row in rows]
    wide = torch.cat([rows[:, :10].half().double(), rows[:, 10:].double()], dim=1)
    with dashpot.backend("reference"):
        want = dashpot.bulyan(wide, 1).split([10, 20])
    for part, true in zip(dashpot.bulyan(lists, 1), want, strict=True):
        tolerance = 2 * torch.finfo(part.dtype).eps
        torch.testing.assert_close(part.double(), true, rtol=tolerance, atol=tolerance)


def test_gradient_flows_with_the_choice_held_fixed(backend64, random_rows):
    rows = random_rows(7, 20, device=backend64.device)
    chosen = dashpot.bulyan_rows(dashpot.pairwise_sqdist(rows), 1)
    leaf = rows.clone().requires_grad_()
    dashpot.bulyan(leaf, 1).sum().backward()
    assert not leaf.grad[~chosen].any()
    torch.testing.assert_close(leaf.grad.sum(0), torch.ones_like(leaf.grad[0]))
    assert (leaf.grad.count_nonzero(0) == 3).all()


def test_out(backend, random_rows):
    rows = random_rows(7, 26, dtype=torch.float32, device=backend.device)
    out = torch.empty_like(rows[0])
    assert dashpot.bulyan(rows, 1, out=out) is out
    assert torch.equal(out, dashpot.bulyan(rows, 1))


def test_errors():
    rows = torch.ones(7, 2)
    with pytest.raises(ValueError, match=r"f: expected f >= 0 and 4 f \+ 3 <= p = 7, got 2"):
        dashpot.bulyan(rows, 2)
    with pytest.raises(TypeError, match=r"f: expected an int, got str"):
        dashpot.bulyan(rows, "1")
    with pytest.raises(TypeError, match=r"grads: .*got NoneType"):
        dashpot.bulyan(None, 1)
