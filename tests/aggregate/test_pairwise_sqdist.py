"""pairwise_sqdist: D_ij = |g_i - g_j|^2, from differences."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st


def distances(rows: torch.Tensor) -> torch.Tensor:
    """(p, d) -> (p, p) float64."""
    wide = rows.double()
    return (wide[:, None] - wide[None, :]).square().sum(-1)


def test_vector(backend64):
    """Integers: every sum is exact."""
    rows = torch.tensor([[1, 2, 3], [-4, 5, 0], [0, 0, 7]], device=backend64.device).double()
    want = torch.tensor([[0, 43, 21], [43, 0, 90], [21, 90, 0]]).double()
    assert torch.equal(dashpot.pairwise_sqdist(rows).cpu(), want)


@given(p=st.integers(1, 9), d=st.integers(0, 70), seed=st.integers(0, 99))
def test_is_a_distance(backend64, random_rows, p, d, seed):
    """Symmetric, zero on the diagonal, triangle inequality, moves with the workers."""
    rows = random_rows(p, d, seed, device=backend64.device)
    sqdist = dashpot.pairwise_sqdist(rows)
    assert sqdist.shape == (p, p) and sqdist.dtype == torch.float64
    assert torch.equal(sqdist, sqdist.mT) and not sqdist.diagonal().any()
    distance = sqdist.sqrt()
    assert (distance[:, None] <= distance[:, :, None] + distance[None] + 1e-9).all()
    order = torch.randperm(p)
    moved = dashpot.pairwise_sqdist(rows[order])
    torch.testing.assert_close(moved, sqdist[order][:, order], rtol=1e-13, atol=0)


@given(seed=st.integers(0, 99), shift=st.floats(-50, 50))
def test_translation_changes_nothing(backend64, random_rows, seed, shift):
    rows = random_rows(5, 30, seed, device=backend64.device)
    torch.testing.assert_close(
        dashpot.pairwise_sqdist(rows + shift), dashpot.pairwise_sqdist(rows), rtol=1e-11, atol=0
    )


def test_close_workers_do_not_cancel(backend):
    """Rows that differ in the last bit: K_ii + K_jj - 2 K_ij would be rounding alone."""
    eps = torch.finfo(torch.float32).eps
    rows = torch.ones(2, 1000, device=backend.device)
    rows[1, ::10] += eps
    want = 100 * eps**2
    sqdist = dashpot.pairwise_sqdist(rows)[0, 1].item()
    assert sqdist == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs(backend, random_rows, dtype):
    rows = random_rows(6, 2500, dtype=dtype, device=backend.device)
    torch.testing.assert_close(dashpot.pairwise_sqdist(rows), distances(rows), rtol=3e-6, atol=0)


def test_every_form_gives_the_same(backend64, random_rows, forms):
    rows = random_rows(4, 26, device=backend64.device)
    for grads in forms(rows).values():
        torch.testing.assert_close(
            dashpot.pairwise_sqdist(grads), distances(rows), rtol=1e-13, atol=0
        )


def test_parameters_of_mixed_dtypes(backend, random_rows):
    rows = random_rows(3, 30, dtype=torch.float32, device=backend.device)
    lists = [[row[:10].half(), row[10:].clone()] for row in rows]
    parts = torch.cat([rows[:, :10].half().double(), rows[:, 10:].double()], dim=1)
    torch.testing.assert_close(dashpot.pairwise_sqdist(lists), distances(parts), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_its_own_entries_only(backend, random_rows, bad):
    rows = random_rows(5, 33, dtype=torch.float32, device=backend.device)
    rows[2, 7] = bad
    sqdist = dashpot.pairwise_sqdist(rows)
    others = torch.tensor([0, 1, 3, 4])
    assert not sqdist[2, others].isfinite().any()
    want = distances(rows[others])
    torch.testing.assert_close(sqdist[others][:, others], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
def test_mask_leaves_rows_out(backend, random_rows, forms, form):
    rows = random_rows(4, 34, dtype=torch.float32, device=backend.device)
    mask = torch.tensor([True, False, True, True], device=backend.device)
    want = torch.where(mask[:, None] & mask[None, :], distances(rows), 0)
    rows[1] = torch.nan
    sqdist = dashpot.pairwise_sqdist(forms(rows)[form], mask=mask)
    torch.testing.assert_close(sqdist, want, rtol=1e-6, atol=0)


def test_norms_lie_on_the_diagonal(backend64, random_rows, forms):
    """The squared norms, the distances from the origin; all else as without them."""
    rows = random_rows(7, 34, device=backend64.device)
    want = distances(rows) + torch.diag(rows.square().sum(1))
    for grads in forms(rows).values():
        sqdist = dashpot.pairwise_sqdist(grads, norms=True)
        torch.testing.assert_close(sqdist, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_norms_beyond_float32s_squares(backend, random_rows, scale):
    """One row's squares leave it, so all is summed again in float64."""
    rows = random_rows(4, 40, dtype=torch.float32, device=backend.device)
    rows[2] *= scale
    want = distances(rows) + torch.diag(rows.double().square().sum(1))
    sqdist = dashpot.pairwise_sqdist(rows, norms=True)
    torch.testing.assert_close(sqdist, want, rtol=3e-6, atol=0)


def test_a_bad_row_shows_on_the_diagonal(backend, random_rows):
    """With norms and without: that is how the rules know it."""
    rows = random_rows(5, 33, dtype=torch.float32, device=backend.device)
    rows[2, 7], rows[4, 0] = torch.nan, torch.inf
    for norms in (True, False):
        diagonal = dashpot.pairwise_sqdist(rows, norms=norms).diagonal()
        assert diagonal.isfinite().tolist() == [True, True, False, True, False]


def test_gradient_of_norms(backend64, random_rows):
    rows = random_rows(4, 19, device=backend64.device).requires_grad_()
    dd = torch.randn(4, 4, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad(dashpot.pairwise_sqdist(rows, norms=True), rows, dd)
    truth = distances(rows) + torch.diag(rows.square().sum(1))
    torch.testing.assert_close(grad, torch.autograd.grad(truth, rows, dd)[0])


def test_gradient(backend64, random_rows):
    """Against autograd through the definition, with an asymmetric dD."""
    rows = random_rows(4, 19, device=backend64.device).requires_grad_()
    dd = torch.randn(4, 4, dtype=torch.float64, device=backend64.device)
    (grad,) = torch.autograd.grad(dashpot.pairwise_sqdist(rows), rows, dd)
    (want,) = torch.autograd.grad(distances(rows), rows, dd)
    torch.testing.assert_close(grad, want)


def test_gradient_through_lists_and_mask(backend64, random_rows):
    rows = random_rows(3, 19, device=backend64.device)
    mask = torch.tensor([True, False, True], device=backend64.device)
    lists = [[row[:7].clone().requires_grad_(), row[7:].clone().requires_grad_()] for row in rows]
    leaves = [tensor for row in lists for tensor in row]
    total = dashpot.pairwise_sqdist(lists, mask=mask).sum()
    grads = torch.cat(torch.autograd.grad(total, leaves)).reshape(3, 19)
    want = torch.zeros_like(rows)
    want[0], want[2] = 4 * (rows[0] - rows[2]), 4 * (rows[2] - rows[0])
    torch.testing.assert_close(grads, want)


def test_errors():
    rows = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"grads: .*got str"):
        dashpot.pairwise_sqdist("rows")
    with pytest.raises(TypeError, match=r"grads: .*float64.*got torch.int64"):
        dashpot.pairwise_sqdist(torch.arange(3))
    with pytest.raises(ValueError, match=r"mask: .*\(3,\).*\(4,\)"):
        dashpot.pairwise_sqdist(rows, mask=torch.ones(4).bool())
    with pytest.raises(TypeError, match=r"mask: .*Tensor.*got bool"):
        dashpot.pairwise_sqdist(rows, mask=True)
