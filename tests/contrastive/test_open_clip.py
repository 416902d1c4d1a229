"""open_clip's name: its values and gradients, with a scale that learns."""

from __future__ import annotations

import pytest
import torch
from dashpot.contrastive.open_clip import ClipLoss
from torch.nn import functional


@pytest.mark.peers
@pytest.mark.parametrize("bias", [None, -10.0])
def test_clip_loss(peers, views, bias):
    z1, z2 = views(33, 20)
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    unit = [functional.normalize(z) for z in (z1, z2)]
    theirs = peers.load("open_clip.loss").ClipLoss(cache_labels=True)(*unit, scale, bias)
    ours = ClipLoss(cache_labels=True)(*unit, scale, bias, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(ours, theirs)
    grads = [
        torch.autograd.grad(loss, (z1, z2, scale), retain_graph=True) for loss in (ours, theirs)
    ]
    assert grads[0][2].abs() > 1e-6
    torch.testing.assert_close(*grads)


def test_errors():
    with pytest.raises(ValueError, match=r"local_loss and gather_with_grad: .*False and False"):
        ClipLoss(world_size=2)
    with pytest.raises(ValueError, match="use_horovod: expected False, got True"):
        ClipLoss(use_horovod=True)
