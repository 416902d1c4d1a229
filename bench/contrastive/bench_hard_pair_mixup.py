"""hard_pair_mixup, forward + backward: gathers, interpolations and soft labels, against the same in
eager PyTorch."""

import torch
from dashpot._measure import Peer

OP = "hard_pair_mixup"
SIZES = {torch.float32: [(64, 2048), (256, 2048), (4096, 2048)]}
GRADIENT = (0,)


def FLOOR(features, labels, *_):
    """Forward: a batch in, three out; backward: three in, one out; soft labels of five classes."""
    b, d = features.shape
    return 4 * b * (8 * d + 15), 12 * b * d


def eager(features, labels, perm, lam_neg, lam_pos, hard_pos, hard_neg, num_classes, neg_clip,
          detach_first):  # fmt: skip
    hot = torch.nn.functional.one_hot(labels, num_classes).to(features.dtype)

    def both(rows):
        first = rows.detach() if detach_first else rows
        far, near = lam_neg[:, None], lam_pos[:, None]
        random = (1 - far) * rows + far * rows[perm]
        hard = near * rows[hard_pos] + (1 - near) * rows[hard_neg]
        return torch.cat([first, random, hard])

    return both(features), both(hot)


PEERS = {"eager": Peer(eager)}


def test_hard_pair_mixup(measure):
    measure()
