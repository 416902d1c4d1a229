"""nt_xent: two views against each other and themselves."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional


def test_vectors(backend64, spec_views, spec_ids):
    z1, z2 = spec_views(backend64.device)
    ids = spec_ids.to(z1.device)
    loss = dashpot.nt_xent(z1, z2, temperature=0.5)
    assert loss.item() == pytest.approx(1.1524736781518978, abs=1e-14)
    grad = torch.autograd.grad(loss, z1)[0]
    want = [-0.1383245143, -0.0383408693, -0.0383408693]
    assert grad[1].tolist() == pytest.approx(want, abs=1e-10)
    loss = dashpot.nt_xent(z1, z2, temperature=0.5, subject_ids=ids)
    assert loss.item() == pytest.approx(1.0480707702845231, abs=1e-14)
    loss = dashpot.nt_xent(z1, z2, temperature=0.5, subject_ids=ids, mask_cross_view=True)
    assert loss.item() == pytest.approx(0.8698277777756733, abs=1e-14)


def by_hand(z1, z2, ids, temperature, within, mask_across):
    """The definition, over all pairs."""
    b = len(z1)
    z = functional.normalize(torch.cat([z1, z2]))
    s = z @ z.T / temperature
    ids = torch.arange(b) if ids is None else ids
    keep = torch.zeros(2 * b, 2 * b, dtype=torch.bool)
    for i in range(2 * b):
        for j in range(2 * b):
            same = bool(ids[i % b] == ids[j % b])
            if i // b == j // b:
                keep[i, j] = within and not same
            else:
                keep[i, j] = not (mask_across and same) or i % b == j % b
    positive = torch.cat([torch.arange(b, 2 * b), torch.arange(b)])
    return functional.cross_entropy(s.masked_fill(~keep.to(s.device), -torch.inf),
                                    positive.to(s.device))  # fmt: skip


@given(b=st.integers(2, 9), seed=st.integers(0, 9), within=st.booleans(), across=st.booleans(),
       subjects=st.booleans(), temperature=st.sampled_from([0.5, 0.01]))  # fmt: skip
def test_every_option(backend64, views, b, seed, within, across, subjects, temperature):
    z1, z2 = views(b, 6, seed, device=backend64.device)
    ids = torch.randint(0, b, (b,)) if subjects else None
    got = dashpot.nt_xent(
        z1, z2, temperature=temperature, subject_ids=None if ids is None else ids.to(z1.device),
        within_view=within, mask_cross_view=across,
    )  # fmt: skip
    want = by_hand(z1, z2, ids, temperature, within, across)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (z1, z2)), torch.autograd.grad(want, (z1, z2)),
        rtol=1e-6, atol=1e-9,
    )  # fmt: skip


def test_several_panels(backend64, views):
    z1, z2 = views(150, 33, device=backend64.device)
    ids = torch.arange(150, device=z1.device) % 70
    got = dashpot.nt_xent(z1, z2, temperature=0.1, subject_ids=ids, mask_cross_view=True)
    want = by_hand(z1, z2, ids.cpu(), 0.1, True, True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (z1, z2)), torch.autograd.grad(want, (z1, z2))
    )


def test_detached_view(backend64, views):
    """A view from a momentum encoder takes part, and the other's gradient stays the same."""
    z1, z2 = views(70, 8, device=backend64.device)
    want = torch.autograd.grad(dashpot.nt_xent(z1, z2), z1)[0]
    loss = dashpot.nt_xent(z1, z2.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, z1)[0], want)


def test_one_row(backend, views):
    z1, z2 = views(1, 4, dtype=torch.float32, device=backend.device)
    loss = dashpot.nt_xent(z1, z2)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(g.abs().max() < 1e-3 for g in torch.autograd.grad(loss, (z1, z2)))


def test_degenerate_rows(backend, views):
    """Duplicates, antipodes and zero rows: finite."""
    z1, z2 = (z.detach().clone() for z in views(8, 4, dtype=torch.float32, device=backend.device))
    z1[1], z2[2], z1[3], z2[4] = z1[0], z1[2], -z1[0], 0
    z1.requires_grad_(), z2.requires_grad_()
    for temperature in (0.04, 0.01):
        loss = dashpot.nt_xent(z1, z2, temperature=temperature)
        assert all(g.isfinite().all() for g in (loss, *torch.autograd.grad(loss, (z1, z2))))


@pytest.mark.peers
def test_lightly_and_metric_learning(peers, views):
    z1, z2 = views(17, 12)
    lightly = peers.load("lightly.loss").NTXentLoss(temperature=0.3)
    metric = peers.load("pytorch_metric_learning.losses").NTXentLoss(temperature=0.3)
    labels = torch.arange(17).repeat(2)
    for want in (lightly(z1, z2), metric(torch.cat([z1, z2]), labels)):
        got = dashpot.contrastive.NTXent(0.3)(z1, z2)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(got, (z1, z2)), torch.autograd.grad(want, (z1, z2)),
            rtol=1e-5, atol=1e-8,
        )  # fmt: skip


Z, IDS = torch.ones(3, 4), torch.arange(3)
BAD = [
    (lambda: dashpot.nt_xent(3, Z), TypeError, r"z1: .*Tensor.*got int"),
    (lambda: dashpot.nt_xent(Z, Z[:2]), ValueError, r"z2: .*\(3, 4\).*got \(2, 4\)"),
    (lambda: dashpot.nt_xent(Z, Z, temperature=torch.inf), ValueError, r"temperature: .*inf"),
    (lambda: dashpot.nt_xent(Z, Z, subject_ids=IDS.float()), TypeError, r"subject_ids: .*integers"),
    (lambda: dashpot.nt_xent(Z, Z, subject_ids=IDS[:2]), ValueError, r"subject_ids: .*\(3,\)"),
    (lambda: dashpot.nt_xent(Z, Z, subject_ids=[0, 1, 2]), TypeError, r"subject_ids: .*got list"),
    (lambda: dashpot.nt_xent(Z, Z, within_view=2), TypeError, r"within_view: .*bool.*got int"),
    (lambda: dashpot.nt_xent(Z, Z, mask_cross_view="no"), TypeError, r"mask_cross_view: .*bool"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_row_that_is_not_a_number_shows(backend, views):
    """Also where rows of finite numbers follow it in the same panel."""
    z1, z2 = (z.detach().clone() for z in views(40, 4, dtype=torch.float32, device=backend.device))
    z1[1, 2] = torch.nan
    assert dashpot.nt_xent(z1, z2).isnan()
