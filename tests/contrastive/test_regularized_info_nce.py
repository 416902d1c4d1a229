"""regularized_info_nce: NT-Xent and KoLeo in one sweep."""

from __future__ import annotations

import dashpot
import pytest
import torch


def test_vector(backend64, spec_views, spec_ids):
    z1, z2 = spec_views(backend64.device)
    ids = spec_ids.to(z1.device)
    loss = dashpot.regularized_info_nce(z1, z2.detach(), subject_ids=ids)
    assert loss.item() == pytest.approx(0.7564440558610764, abs=1e-14)
    grad = torch.autograd.grad(loss, z1)[0]
    want = [-0.7104263851, 2.1312791553, -0.6545931879]
    assert grad[2].tolist() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("b", [5, 130])
def test_is_the_sum_of_its_terms(backend64, views, detached, within, b):
    z1, z2 = views(b, 9, device=backend64.device)
    z2 = z2.detach() if detached else z2
    ids = torch.arange(b, device=z1.device) % 4
    options = {"temperature": 0.1, "subject_ids": ids, "within_view": within}
    got = dashpot.regularized_info_nce(z1, z2, koleo_weight=0.3, return_terms=True, **options)
    contrastive = dashpot.nt_xent(z1, z2, **options)
    koleo = 0.5 * (dashpot.koleo_loss(z1) + dashpot.koleo_loss(z2))
    want = contrastive + 0.3 * koleo, contrastive, koleo
    torch.testing.assert_close(got, want)
    leaves = (z1,) if detached else (z1, z2)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=z1.device)
    grads, right = (
        torch.autograd.grad((torch.stack(terms) * weights).sum(), leaves) for terms in (got, want)
    )
    torch.testing.assert_close(grads, right)


def test_without_gradient(backend, views):
    z1, z2 = views(6, 5, dtype=torch.float32, device=backend.device)
    with torch.no_grad():
        loss = dashpot.regularized_info_nce(z1, z2)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(dashpot.regularized_info_nce(z1, z2).item(), rel=1e-6)


def test_no_rows(backend):
    z = torch.zeros(0, 5, device=backend.device, requires_grad=True)
    loss = dashpot.contrastive.RegularizedInfoNCE()(z, z)
    loss.backward()
    assert loss.item() == 0 and z.grad.shape == (0, 5)


Z = torch.ones(3, 4)
BAD = [
    (lambda: dashpot.regularized_info_nce(Z, Z[:, 1:]), ValueError, r"z2: .*\(3, 4\).*\(3, 3\)"),
    (
        lambda: dashpot.regularized_info_nce(Z, Z, koleo_weight=-1),
        ValueError,
        r"koleo_weight: .*-1",
    ),
    (
        lambda: dashpot.regularized_info_nce(Z, Z, return_terms=1),
        TypeError,
        r"return_terms.*bool",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
