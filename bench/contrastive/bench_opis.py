"""opis' counts against NumPy with a loop over the classes; odd sizes find their range."""

import numpy as np
import torch
from dashpot._measure import Peer

OP = "opis"
SIZES = {torch.float32: [("signs", n, 128) for n in (1000, 10_000, 10_001)]}


def by_class(embeddings, classes, num_classes, d_range, ranks, num_thresholds, euclidean):
    """Each class's rows against all, distances sorted into the intervals of the grid."""
    u = embeddings.numpy()
    u = u / np.linalg.norm(u, axis=1, keepdims=True)
    ids = classes.numpy()

    def distances(s):
        return np.sqrt(np.maximum(2 - 2 * s, 0)) if euclidean else 1 - s

    if not d_range:
        d = distances(u @ u.T)[np.triu(ids[:, None] != ids[None, :], 1)]
        chosen = [rank - 1 for rank in ranks]
        d_range = np.partition(d, chosen)[chosen]
    grid = np.linspace(*d_range, num_thresholds)
    genuine = np.zeros((num_classes, num_thresholds), np.int64)
    impostor = np.zeros_like(genuine)
    edges = np.concatenate([grid, [np.inf]])
    for c in range(num_classes):
        inside = ids == c
        d = distances(u[inside] @ u.T)
        own, other = d[:, inside], d[:, ~inside].ravel()
        own = own[np.triu_indices(len(own), 1)]
        for table, some in ((genuine, own), (impostor, other)):
            place = np.searchsorted(edges, some)
            table[c] = np.bincount(place, minlength=num_thresholds + 1)[:num_thresholds].cumsum()
    return torch.from_numpy(genuine), torch.from_numpy(impostor), torch.from_numpy(grid)


# Not compared bit by bit: a pair next to a threshold may fall on its other side.
PEERS = {"numpy by class": Peer(by_class, lambda size, dtype, device, *_: device == "cpu",
                                checked=False)}  # fmt: skip


def test_opis(measure):
    measure()
