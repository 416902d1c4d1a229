"""focal_supcon_loss, forward + backward: mixed batches (20 classes and twice as many rows alone)
and batches of groups, against the published code's operations and the bare matrix products.
"""

import torch
from dashpot._measure import Peer

OP = "focal_supcon_loss"
SIZES = {
    torch.float32: [
        ("mixed", 768, 128), ("mixed", 768, 256), (768, 128), (2048, 128), (8192, 128),
    ],
}  # fmt: skip
GRADIENT = (0,)


def FLOOR(z, groups, *_):
    """Forward N^2 d by symmetry, backward the same again and 2 N^2 d for the gradient; of a row
    alone with a row alone nothing."""
    n, d = z.shape
    _, place, counts = groups.unique(return_inverse=True, return_counts=True)
    alone = int((counts[place] == 1).sum())
    return 2 * z.numel() * z.element_size() + 8 * n, 4 * (n * n - alone * alone) * d


def published(z, groups, temperature, gamma, by_count, all_anchors, normalize, *_):
    """Masks as floats over the whole matrix, logits less their maximum, weights of every pair."""
    if normalize:
        z = torch.nn.functional.normalize(z, dim=1)
    column = groups[:, None]
    positive = torch.eq(column, column.mT).to(z.dtype)  # (N, N)
    logits = torch.div(z @ z.mT, temperature)
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.scatter(
        torch.ones_like(positive), 1, torch.arange(len(z), device=z.device)[:, None], 0
    )
    positive = positive * others
    log_p = logits - torch.log((torch.exp(logits) * others).sum(1, keepdim=True))
    weight = 1 - torch.exp(log_p)
    weight = weight if gamma == 1 else weight**gamma
    rows = (weight * positive * log_p).sum(1)
    rows = rows / (positive.sum(1).clamp(min=1) if by_count else len(z))
    return -rows.sum() / torch.nonzero(positive.sum(1)).shape[0]


def products(z, groups, *_):
    """The three matrix products that eager PyTorch needs."""
    with torch.no_grad():
        s = z @ z.mT  # (N, N)
        return s @ z, s.mT @ z


PEERS = {
    "published": Peer(published, lambda size, *_: size[-2] <= 2048),
    "torch.compile": Peer(
        torch.compile(published, dynamic=False),
        lambda size, dtype, device, options: device == "cuda" and size[-2] <= 2048,
    ),
    "products": Peer(products, lambda size, *_: size[-2] <= 2048, checked=False),
}


def test_focal_supcon_loss(measure):
    measure()
