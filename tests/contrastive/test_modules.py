"""The Modules: the functions with their options held."""

from __future__ import annotations

import dashpot
import torch
from torch.nn import functional


def test_modules(views):
    z1, z2 = views(9, 5, dtype=torch.float32)
    module = dashpot.contrastive.InfoNCE(0.1, symmetric=True, learnable=True)
    loss = module(z1, z2)
    torch.testing.assert_close(loss, dashpot.info_nce(z1, z2, temperature=0.1, symmetric=True))
    loss.backward()
    assert module.log_scale.grad.abs() > 0
    unit = functional.normalize(z1.detach()), functional.normalize(z2.detach())
    found = dashpot.contrastive.ClipLoss()(*unit, torch.tensor(10.0), output_dict=True)
    torch.testing.assert_close(found["contrastive_loss"], loss.detach())


def test_nt_xent_and_koleo(views):
    z1, z2 = views(9, 5, dtype=torch.float32)
    ids = torch.arange(9) % 4
    loss = dashpot.contrastive.NTXent(0.2)(z1, z2)
    torch.testing.assert_close(loss, dashpot.nt_xent(z1, z2, temperature=0.2))
    torch.testing.assert_close(dashpot.contrastive.KoLeo()(z1), dashpot.koleo_loss(z1))
    both = dashpot.contrastive.RegularizedInfoNCE(0.1, koleo_weight=0.3)(z1, z2, subject_ids=ids)
    want = dashpot.regularized_info_nce(z1, z2, temperature=0.1, koleo_weight=0.3, subject_ids=ids)
    torch.testing.assert_close(both, want)
