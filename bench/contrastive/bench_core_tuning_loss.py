"""core_tuning_loss, forward + backward: soft-label cross entropy and the focal loss of a mixed
batch, against the same in eager PyTorch."""

import torch
from dashpot._measure import Peer

OP = "core_tuning_loss"
SIZES = {torch.float32: [("mixed", 192, 256), ("mixed", 768, 256)]}
GRADIENT = (0, 1)


def eager(logits, z, soft, groups):
    off = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    mask = torch.eq(groups[:, None], groups[None, :]).to(z.dtype) * off
    s = z @ z.mT / 0.07
    s = s - s.max(1, keepdim=True).values.detach()
    log_p = s - torch.log((torch.exp(s) * off).sum(1, keepdim=True))
    rows = ((1 - torch.exp(log_p)) * mask * log_p).mean(1)
    contrast = -rows.sum() / torch.nonzero(mask.sum(1)).shape[0]
    return torch.nn.functional.cross_entropy(logits, soft) + 0.1 * contrast


PEERS = {"eager": Peer(eager)}


def test_core_tuning_loss(measure):
    measure()
