"""koleo_loss: rows repelled by their nearest neighbours."""

from __future__ import annotations

import math

import dashpot
import pytest
import torch
from dashpot._dispatch import REGISTRY
from hypothesis import given
from hypothesis import strategies as st


def test_vectors(backend64, spec_views):
    z, _ = spec_views(backend64.device)
    loss = dashpot.koleo_loss(z)
    assert loss.item() == pytest.approx(-0.12339054508253294, abs=1e-14)
    grad = torch.autograd.grad(loss, z)[0]
    want = [0.1473814788, 0.0614089495, -0.0736907394]
    assert grad[0].tolist() == pytest.approx(want, abs=1e-10)
    nearest = REGISTRY["koleo_loss"].forward_op(z.detach(), None, 0, 1, 1e-8, True)[1]
    assert nearest[:, 0].tolist() == [2, 3, 0, 1]
    assert dashpot.koleo_loss(z, topk=2).item() == pytest.approx(-0.1781456578018776, abs=1e-14)


@given(b=st.integers(2, 140), seed=st.integers(0, 9), k=st.integers(1, 3))
def test_neighbours_are_those_of_a_full_search(backend64, views, b, seed, k):
    z = views(b, 5, seed, device=backend64.device)[0].detach()
    k = min(k, b - 1)
    u = torch.nn.functional.normalize(z)
    cosine = (u @ u.T).fill_diagonal_(-torch.inf)
    want = cosine.sort(dim=1, descending=True, stable=True).indices[:, :k]
    distance = torch.nn.functional.pairwise_distance(u[:, None], u[want], eps=1e-8)
    rows = dashpot.koleo_loss(z, topk=k, reduction="none")
    torch.testing.assert_close(rows, -(distance + 1e-8).log().mean(1))


def test_antipodes(backend64):
    """A row never chooses itself, also where all others point away."""
    z = torch.tensor([[1.0, 0], [-1, 0]], dtype=torch.float64, device=backend64.device)
    assert dashpot.koleo_loss(z).item() == pytest.approx(-math.log(2), abs=1e-7)


def test_duplicates(backend, views):
    """Distance eps sqrt(D): large and finite; the pulls of two duplicates on each other cancel."""
    z = views(80, 4, dtype=torch.float32, device=backend.device)[0].detach().clone()
    z[70] = z[3]
    z.requires_grad_()
    rows = dashpot.koleo_loss(z, reduction="none")
    assert rows[3].item() == rows[70].item() == pytest.approx(-math.log(3e-8), rel=1e-4)
    grad = torch.autograd.grad(rows.sum(), z)[0]
    assert grad.isfinite().all() and grad[3].any()


def test_the_lowest_index_among_equals(backend):
    z = torch.ones(130, 3, device=backend.device)
    nearest = REGISTRY["koleo_loss"].forward_op(z, None, 0, 1, 1e-8, True)[1]
    assert nearest[:, 0].tolist() == [1] + [0] * 129


def test_one_row_and_none(backend):
    for b in (0, 1):
        z = torch.ones(b, 4, device=backend.device, requires_grad=True)
        loss = dashpot.koleo_loss(z)
        loss.backward()
        assert loss.item() == 0 and not z.grad.any()


def test_a_row_that_is_not_a_number_shows(backend, views):
    z = views(5, 4, dtype=torch.float32, device=backend.device)[0].detach().clone()
    z[2, 0] = torch.nan
    assert dashpot.koleo_loss(z).isnan()


@pytest.mark.peers
def test_lightly(peers, views):
    z, _ = views(90, 12)
    want = peers.load("lightly.loss").KoLeoLoss()(z)
    got = dashpot.contrastive.KoLeo()(z)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, z), torch.autograd.grad(want, z))


Z = torch.ones(3, 4)
BAD = [
    (lambda: dashpot.koleo_loss("z"), TypeError, r"z: .*Tensor.*got str"),
    (lambda: dashpot.koleo_loss(Z, topk=3), ValueError, r"topk: .*B - 1 = 2, got 3"),
    (lambda: dashpot.koleo_loss(Z, topk=0), ValueError, r"topk: .*got 0"),
    (lambda: dashpot.koleo_loss(Z, topk=1.0), TypeError, r"topk: .*int, got float"),
    (lambda: dashpot.koleo_loss(Z, eps=0.0), ValueError, r"eps: .*> 0, got 0"),
    (lambda: dashpot.koleo_loss(Z, normalize=1), TypeError, r"normalize: .*bool"),
    (lambda: dashpot.koleo_loss(Z, reduction=None), ValueError, r"reduction: .*None"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
