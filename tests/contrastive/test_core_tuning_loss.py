"""core_tuning_loss: soft-label cross entropy + eta times the focal contrastive loss."""

from __future__ import annotations

import dashpot
import pytest
import torch
import torch.nn.functional as F


def mixed_batch(b=20, classes=3, dtype=torch.float64, device="cpu"):
    """What a training step hands over: logits and unit rows of the mixed batch, labels, groups."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(b, 6, generator=generator, dtype=dtype).to(device)
    labels = torch.randint(0, classes, (b,), generator=generator).to(device)
    mixed, soft, groups = dashpot.hard_pair_mixup(features, labels, classes)
    logits = mixed @ torch.randn(6, classes, generator=generator, dtype=dtype).to(device)
    return logits, F.normalize(mixed, dim=1), soft, groups


def test_is_its_two_terms(backend64):
    logits, z, soft, groups = mixed_batch(device=backend64.device)
    options = {"temperature": 0.2, "gamma": 2.0}
    loss = dashpot.core_tuning_loss(logits, z, soft, groups, eta=0.3, **options)
    focal = dashpot.focal_supcon_loss(z, groups, **options)
    torch.testing.assert_close(loss, F.cross_entropy(logits, soft) + 0.3 * focal)
    assert focal > 0


def test_defaults_are_the_official_ones(backend64):
    logits, z, soft, groups = mixed_batch(device=backend64.device)
    want = F.cross_entropy(logits, soft) + 0.1 * dashpot.focal_supcon_loss(
        z, groups, temperature=0.07, gamma=1.0, positives_norm="batch"
    )
    torch.testing.assert_close(dashpot.core_tuning_loss(logits, z, soft, groups), want)


def test_gradients(backend64):
    """(softmax - soft) / N for the logits, eta times the focal loss's for the rows."""
    logits, z, soft, groups = mixed_batch(device=backend64.device)
    logits, z = logits.requires_grad_(), z.requires_grad_()
    got = torch.autograd.grad(
        dashpot.core_tuning_loss(logits, z, soft, groups, eta=2.0), (logits, z)
    )
    focal = dashpot.focal_supcon_loss(z, groups)
    torch.testing.assert_close(got[0], (logits.softmax(1) - soft) / len(logits))
    torch.testing.assert_close(got[1], 2 * torch.autograd.grad(focal, z)[0])


def test_module(backend64):
    logits, z, soft, groups = mixed_batch(device=backend64.device)
    module = dashpot.contrastive.CoreTuningLoss(eta=0.5, temperature=0.3, gamma=0.0)
    want = dashpot.core_tuning_loss(logits, z, soft, groups, eta=0.5, temperature=0.3, gamma=0.0)
    assert torch.equal(module(logits, z, soft, groups), want)
    assert "eta=0.5" in repr(module)


def test_a_training_step_lowers_the_loss(backend64):
    """The whole method on a linear backbone: mining, mixing, loss, step."""
    torch.manual_seed(0)
    labels = torch.arange(30, device=backend64.device) % 3
    inputs = torch.randn(30, 8, dtype=torch.float64, device=backend64.device) + labels[:, None]
    weight = torch.randn(8, 6, dtype=torch.float64, device=backend64.device, requires_grad=True)
    head = torch.randn(6, 3, dtype=torch.float64, device=backend64.device, requires_grad=True)
    perm = torch.randperm(30, device=backend64.device)
    lam = torch.rand(2, 30, dtype=torch.float64, device=backend64.device)
    losses = []
    for _ in range(15):
        mixed, soft, groups = dashpot.hard_pair_mixup(
            inputs @ weight, labels, 3, perm=perm, lam_neg=lam[0], lam_pos=lam[1]
        )
        loss = dashpot.core_tuning_loss(mixed @ head, F.normalize(mixed), soft, groups)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, (weight, head))
        with torch.no_grad():
            for one, grad in zip((weight, head), grads, strict=True):
                one -= 0.05 * grad
    assert losses[-1] < 0.8 * losses[0]


LOGITS, Z, SOFT = torch.ones(6, 2), torch.ones(6, 3), torch.full((6, 2), 0.5)
G = torch.zeros(6, dtype=torch.int64)
BAD = [
    ((LOGITS, Z[:5], SOFT, G), {}, ValueError, r"z: expected \(6, d\).*got \(5, 3\)"),
    ((LOGITS, Z, SOFT[:, :1], G), {}, ValueError, r"soft: expected \(6, 2\).*got \(6, 1\)"),
    ((LOGITS, Z, SOFT.double(), G), {}, ValueError, r"soft: .*float32.*got .*float64"),
    ((LOGITS, Z, SOFT, G[:2]), {}, ValueError, r"groups: expected \(6,\).*got \(2,\)"),
    ((LOGITS, Z, SOFT, G), {"eta": -0.1}, ValueError, r"eta: .*>= 0, got -0.1"),
    ((LOGITS, Z, SOFT, G), {"eta": None}, TypeError, r"eta: .*float, got NoneType"),
]


@pytest.mark.parametrize(("args", "options", "kind", "message"), BAD, ids=[bad[3] for bad in BAD])
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=message):
        dashpot.core_tuning_loss(*args, **options)
