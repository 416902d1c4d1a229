"""supcon_loss: the focal loss with gamma = 0, a mean over positives; Modules like the peers'."""

from __future__ import annotations

import dashpot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from bench import peers


def batch(n=60, d=8, classes=9, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows.to(device), torch.randint(0, classes, (n,), generator=generator).to(device)


def supcontrast(features, labels, temperature, base=0.07, anchors="all"):
    """The published form: views (B, V, d) stacked, a mask, the mean over all anchors."""
    b, views = features.shape[:2]
    z = torch.cat(features.unbind(1))  # (V * B, d), view by view
    mask = (labels[:, None] == labels[None, :]).to(z.dtype).repeat(views, views)
    mask = mask * (1 - torch.eye(views * b, dtype=z.dtype))
    s = z @ z.mT / temperature
    off = 1 - torch.eye(views * b, dtype=z.dtype)
    log_p = s - (s.exp() * off).sum(1, keepdim=True).log()
    count = mask.sum(1)
    rows = -(temperature / base) * (mask * log_p).sum(1) / count.where(count > 0, 1)
    return rows.mean() if anchors == "all" else rows[:b].mean()


def test_vector(backend64):
    f = torch.tensor([[1, 2, 0], [2, 1, 1], [0, 1, 3], [1, 0, 1], [3, 1, 0]], dtype=torch.float64)
    u = normalize(f).to(backend64.device).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 0], device=u.device)
    loss = dashpot.supcon_loss(u, labels, temperature=0.5)
    assert loss.item() == pytest.approx(1.498438074910284, abs=1e-14)
    (grad,) = torch.autograd.grad(loss, u)
    want = torch.tensor([0.122638342, -0.0385166272, -0.079816641], dtype=torch.float64)
    torch.testing.assert_close(grad[0].cpu(), want, rtol=0, atol=1e-10)


@pytest.mark.peers
@given(seed=st.integers(0, 99), temperature=st.sampled_from([0.07, 0.5]))
def test_pytorch_metric_learning(seed, temperature):
    peer = peers.load("pytorch_metric_learning.losses").SupConLoss(temperature)
    rows, labels = batch(seed=seed)
    leaf = rows.requires_grad_()
    want = peer(leaf, labels)
    ours = dashpot.contrastive.SupConLoss(temperature)
    loss = ours(leaf, labels)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaf), torch.autograd.grad(want, leaf), rtol=1e-9, atol=1e-13
    )


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("labelled", [True, False])
def test_supcontrast(mode, labelled):
    rows, labels = batch(48)
    features = normalize(rows.reshape(24, 2, 8), dim=2).requires_grad_()
    labels = labels[:24] if labelled else None
    loss = dashpot.contrastive.MultiViewSupConLoss(0.1, mode)(features, labels)
    want = supcontrast(features, torch.arange(24) if labels is None else labels, 0.1, anchors=mode)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, features), torch.autograd.grad(want, features)
    )


def test_a_lonely_row_counts_only_for_all_anchors(backend64):
    """With one lonely row among n, the two conventions differ by (n - 1) / n."""
    rows, labels = batch(12, classes=2, device=backend64.device)
    labels[5] = 77
    u = normalize(rows, dim=1)
    some = dashpot.supcon_loss(u, labels)
    torch.testing.assert_close(dashpot.supcon_loss(u, labels, anchors="all"), some * 11 / 12)


def test_is_the_flat_focal_loss(backend64):
    rows, labels = batch(device=backend64.device)
    focal = dashpot.focal_supcon_loss(
        rows, labels, gamma=0.0, positives_norm="count", normalize=True, temperature=0.3
    )
    assert torch.equal(dashpot.supcon_loss(rows, labels, normalize=True, temperature=0.3), focal)


def test_all_one_class_and_all_distinct(backend64):
    rows, labels = batch(70, device=backend64.device)
    u = normalize(rows, dim=1).requires_grad_()
    loss = dashpot.supcon_loss(u, torch.zeros_like(labels), temperature=1.0)
    s = (u @ u.mT).fill_diagonal_(-torch.inf)
    log_p = s.log_softmax(1).masked_fill(torch.eye(70, dtype=torch.bool, device=u.device), 0)
    torch.testing.assert_close(loss, -log_p.sum() / (70 * 69))
    alone = dashpot.supcon_loss(u, torch.arange(70, device=u.device))
    assert alone.item() == 0 and not torch.autograd.grad(alone, u)[0].any()


def test_modules_keep_their_options():
    assert "temperature=0.2" in repr(dashpot.contrastive.SupConLoss(0.2))
    assert "contrast_mode='one'" in repr(dashpot.contrastive.MultiViewSupConLoss(0.2, "one"))


MODULE = dashpot.contrastive.MultiViewSupConLoss
Z, Y = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
BAD = [
    (lambda: dashpot.supcon_loss(Z, Y, anchors="some"), ValueError, r"anchors: .*got 'some'"),
    (lambda: dashpot.supcon_loss(Z, Y.double()), TypeError, r"labels: expected integers"),
    (lambda: dashpot.supcon_loss(Z, Y, temperature=-1.0), ValueError, r"temperature: .*got -1"),
    (lambda: MODULE(contrast_mode="two"), ValueError, r"contrast_mode: .*all, one, got 'two'"),
    (lambda: MODULE()(Z), ValueError, r"features: .*\(B, views, ...\), got \(4, 3\)"),
    (lambda: MODULE()([Z]), TypeError, r"features: .*got list"),
    (lambda: MODULE()(Z[:, None], Y[:2]), ValueError, r"labels: expected \(4,\), got \(2,\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[bad[2] for bad in BAD])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
