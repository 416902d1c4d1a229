"""tcm_loss, forward + backward, against pytorch-metric-learning's list of pairs and the matrix."""

import torch
from dashpot._measure import Peer

from bench import peers

OP = "tcm_loss"
SIZES = {torch.float32: [(512, 512), (2048, 512), (8192, 128)]}
GRADIENT = (0,)


def FLOOR(embeddings, labels, *_):
    """Forward B^2 D by symmetry, backward the same again and 2 B^2 D for the gradient."""
    b, d = embeddings.shape
    return 2 * embeddings.numel() * embeddings.element_size(), 4 * b * b * d


def metric_learning(embeddings, labels, ref, ref_labels, offset, m_pos, m_neg, w_pos, w_neg, _):
    module = peers.load("pytorch_metric_learning.losses").ThresholdConsistentMarginLoss
    return module(w_pos, w_neg, m_pos, m_neg)(embeddings, labels)


def matrix(embeddings, labels, ref, ref_labels, offset, m_pos, m_neg, w_pos, w_neg, _):
    u = torch.nn.functional.normalize(embeddings, dim=1)
    s = u @ u.mT  # (B, B)
    same = labels[:, None] == labels[None, :]
    off = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    pos, neg = same & off & (s <= m_pos), ~same & (s >= m_neg)
    loss_pos = torch.where(pos, m_pos - s, 0).sum() / pos.sum()
    return w_pos * loss_pos + w_neg * torch.where(neg, s - m_neg, 0).sum() / neg.sum()


PEERS = {
    "matrix": Peer(matrix, lambda size, *_: size[0] <= 2048),
    "torch.compile": Peer(
        torch.compile(matrix, dynamic=False),
        lambda size, dtype, device, options: device == "cuda" and size[0] <= 2048,
    ),
    "pytorch-metric-learning": Peer(
        metric_learning,
        lambda size, *_: size[0] <= 512,
        needs="pytorch_metric_learning",
    ),
}


def test_tcm_loss(measure):
    measure()
