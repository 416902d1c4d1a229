"""supcon_loss, forward + backward, against pytorch-metric-learning's and the published code's
operations."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "supcon_loss"
SIZES = {torch.float32: [(256, 128), (768, 128), (2048, 128)]}
OPTIONS = [{"normalize": True}]  # pytorch-metric-learning always does
GRADIENT = (0,)
TEMPERATURE = 0.07


def metric_learning(z, labels, normalize):
    return peers.load("pytorch_metric_learning.losses").SupConLoss(TEMPERATURE)(z, labels)


def published(z, labels, normalize):
    """The matrix of log-probabilities and a mask, the mean over rows with a positive."""
    z = torch.nn.functional.normalize(z)
    off = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    mask = torch.eq(labels[:, None], labels[None, :]).to(z.dtype) * off
    logits = z @ z.mT / TEMPERATURE
    logits = logits - logits.max(1, keepdim=True).values.detach()
    log_p = logits - torch.log((torch.exp(logits) * off).sum(1, keepdim=True))
    count = mask.sum(1)
    rows = (mask * log_p).sum(1) / torch.where(count < 1e-6, 1, count)
    return -rows.sum() / (count > 0).sum()


PEERS = {
    "published": Peer(published),
    "pytorch-metric-learning": Peer(metric_learning, needs="pytorch_metric_learning"),
}


def test_supcon_loss(measure):
    measure()
