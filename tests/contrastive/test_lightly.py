"""lightly's names: its values and gradients."""

from __future__ import annotations

import pytest
import torch
from dashpot.contrastive import lightly


@pytest.mark.peers
@pytest.mark.parametrize("arguments", [(), (0.1,), (0.2, 0, True)])
def test_nt_xent(peers, views, arguments):
    z1, z2 = views(37, 9)
    ours = lightly.NTXentLoss(*arguments)(z1, z2)
    theirs = peers.load("lightly.loss").NTXentLoss(*arguments)(z1, z2)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(loss, (z1, z2)) for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.peers
def test_koleo(peers, views):
    z, _ = views(70, 9)
    ours, theirs = lightly.KoLeoLoss()(z), peers.load("lightly.loss").KoLeoLoss()(z)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z) for loss in (ours, theirs)))


def test_errors():
    with pytest.raises(ValueError, match="memory_bank_size: expected 0, got 4096"):
        lightly.NTXentLoss(memory_bank_size=4096)
    with pytest.raises(ValueError, match="p: expected 2, got 1"):
        lightly.KoLeoLoss(p=1)
    assert "0.5" in repr(lightly.NTXentLoss()) and "1e-08" in repr(lightly.KoLeoLoss())
