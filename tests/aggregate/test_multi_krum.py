"""multi_krum: the mean of the selected rows, and the variants in use."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import peers


def test_vector(backend64, spec_rows):
    update = dashpot.multi_krum(spec_rows(device=backend64.device), 1, k=4)
    torch.testing.assert_close(update.tolist(), [1.05, 1.95, 0.05, -1.0], rtol=0, atol=1e-12)


@given(p=st.integers(3, 12), seed=st.integers(0, 99))
def test_no_fault_is_the_mean(backend64, random_rows, p, seed):
    rows = random_rows(p, 12, seed, device=backend64.device)
    torch.testing.assert_close(dashpot.multi_krum(rows, 0, k=p), rows.mean(0))
    assert torch.equal(dashpot.multi_krum(rows, 0), dashpot.multi_krum(rows, 0, k=p))


@pytest.mark.peers
@pytest.mark.parametrize(("p", "k"), [(5, 2), (15, 12), (15, 1), (33, 7)])
def test_torchjd(backend64, random_rows, p, k):
    krum = peers.load("torchjd.aggregation").Krum
    for seed in range(5):
        rows = random_rows(p, 40, seed)
        update = dashpot.multi_krum(rows.to(backend64.device), (p - 3) // 2, k=k, squared=False)
        want = krum(n_byzantine=(p - 3) // 2, n_selected=k)(rows)
        torch.testing.assert_close(update.cpu(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.peers
@pytest.mark.parametrize(("p", "f", "k"), [(5, 1, 1), (9, 2, 4), (15, 3, 12)])
def test_flower(backend64, random_rows, p, f, k):
    """The variant of Blanchard et al.: squared distances, p - f - 2 neighbours."""
    from flwr.server.strategy.aggregate import aggregate_krum

    for seed in range(5):
        rows = random_rows(p, 40, seed)
        update = dashpot.multi_krum(rows.to(backend64.device), f, k=k)
        (want,) = aggregate_krum([([row.numpy()], 1) for row in rows], f, k)
        torch.testing.assert_close(update.cpu().numpy(), want, rtol=1e-10, atol=1e-12)


def test_garfields_variant(backend64, random_rows):
    """Plain distances to p - f - 1 neighbours, p - f - 2 rows: as that code is written."""
    rows, p, f = random_rows(11, 30), 11, 3
    distance = (rows[:, None] - rows[None]).norm(dim=-1)
    scores = [sum(sorted(distance[i].tolist())[1 : p - f]) for i in range(p)]
    chosen = sorted(range(p), key=scores.__getitem__)[: p - f - 2]
    update = dashpot.multi_krum(
        rows.to(backend64.device), f, k=p - f - 2, neighbours=p - f - 1, squared=False
    )
    torch.testing.assert_close(update.cpu(), rows[chosen].mean(0))


@pytest.mark.parametrize("form", ["tensor", "list", "lists"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_rows_are_as_if_never_there(backend, random_rows, forms, flat, form, bad):
    rows = random_rows(9, 34, dtype=torch.float32, device=backend.device)
    rows[2, 5], rows[6, 33] = bad, bad
    kept = rows[[0, 1, 3, 4, 5, 7, 8]]
    update = flat(dashpot.multi_krum(forms(rows)[form], 3, k=4))
    torch.testing.assert_close(update, dashpot.multi_krum(kept, 1, k=4), rtol=1e-6, atol=1e-6)


def test_more_bad_rows_than_it_bears(backend, random_rows):
    rows = random_rows(9, 34, dtype=torch.float32, device=backend.device)
    rows[:4] = torch.nan
    assert dashpot.multi_krum(rows, 3).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(backend, random_rows, dtype):
    rows = random_rows(7, 2500, dtype=dtype, device=backend.device)
    update = dashpot.multi_krum(rows, 2)
    assert update.dtype == dtype
    tolerance = torch.finfo(dtype).eps
    want = dashpot.multi_krum(rows.double(), 2)
    torch.testing.assert_close(update.double(), want, rtol=tolerance, atol=tolerance)


def test_gradient(backend64, random_rows):
    """Exact, as the selection does not move."""
    rows = random_rows(7, 8, device=backend64.device).requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: dashpot.multi_krum(rows, 2, k=3), [rows])


def test_errors(random_rows):
    with pytest.raises(ValueError, match="k: expected 1 <= k <= 7, got 8"):
        dashpot.multi_krum(random_rows(7, 8), 2, k=8)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        dashpot.multi_krum(random_rows(7, 8), 2, k=0)
