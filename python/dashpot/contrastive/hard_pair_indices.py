"""The op `hard_pair_indices`: the hardest positive and the hardest negative of every row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._grouped import grouped_rows
from dashpot.contrastive._pairs import (
    bytes_of,
    check_choice,
    check_integers,
    check_rows,
    unit_rows,
)


def _first_least(values: Tensor) -> Tensor:
    """Lowest index of each row's least value; NaN is never chosen. (N, N) -> (N,) int64; N where a
    row has no finite value."""
    n = values.shape[1]
    values = torch.where(values.isnan(), torch.inf, values)
    least = values.amin(1, keepdim=True) if n else values.sum(1, keepdim=True)  # (N, 1)
    index = torch.arange(n, device=values.device)
    chosen = torch.where((values == least) & (values < torch.inf), index, n)
    return chosen.amin(1) if n else chosen.sum(1)


def _hard_pair_indices_reference(
    features: Tensor, labels: Tensor, official: bool
) -> tuple[Tensor, Tensor]:
    """c_ij = cosine. hard_pos = argmin_{j != i, same label} c_ij, hard_neg = argmax_{other label}
    c_ij, the lowest index on ties, i where there is none.

    official: pairs left out count as c = 0 instead, and a hard_pos of 0 becomes i.
    """
    u = unit_rows(features.detach())  # (N, d)
    n = u.shape[0]
    c = u @ u.mT  # (N, N)
    index = torch.arange(n, device=u.device)
    own = index[:, None] == index[None, :]
    same = labels[:, None] == labels[None, :]
    left_out = 0.0 if official else torch.inf
    hard_pos = _first_least(torch.where(same & ~own, c, left_out))  # (N,)
    hard_neg = _first_least(torch.where(same, left_out, -c))
    if official:
        hard_pos = torch.where(hard_pos == 0, index, hard_pos)
    return torch.where(hard_pos < n, hard_pos, index), torch.where(hard_neg < n, hard_neg, index)


def _hard_pair_indices_fake(features, labels, official):
    n = features.shape[0]
    return features.new_empty((n,), dtype=torch.int64), features.new_empty((n,), dtype=torch.int64)


def _hard_pair_indices_inputs(size, dtype, device, seed):
    features, labels = grouped_rows(size, dtype, device, seed)
    return features, labels, size[0] % 2 == 0


def _hard_pair_indices_floor(features, labels, official):
    """One read of the rows, two indices a row; a multiply-add per unordered pair and coordinate."""
    n, d = features.shape
    return bytes_of(features, labels) + 16 * n, n * n * d


HARD_PAIR_INDICES = declare(
    "hard_pair_indices",
    forward="(Tensor features, Tensor labels, bool official) -> (Tensor hard_pos, Tensor hard_neg)",
    reference=_hard_pair_indices_reference,
    fake=_hard_pair_indices_fake,
    inputs=_hard_pair_indices_inputs,
    floor=_hard_pair_indices_floor,
    sizes={
        # one row; two; below, at and above tiles of 16 to 128 rows
        "test": [(1, 4), (2, 3), (7, 5), (33, 16), (64, 128), (130, 40), (257, 17)],
        "bench": [(64, 2048), (256, 2048), (4096, 256)],
    },
)


@public
def hard_pair_indices(
    features: Tensor, labels: Tensor, *, mode: Literal["paper", "official"] = "paper"
) -> tuple[Tensor, Tensor]:
    r"""The hardest positive and the hardest negative of every row, without the B x B matrix.

    With :math:`c_{ij}` the cosine of two rows: hard_pos(i) is the row of i's label with the
    least :math:`c_{ij}`, hard_neg(i) the row of another label with the largest; the lowest index if
    several are equal, i itself if there is none.

    Args:
        features: (B, D) rows of any length; float64, float32, bfloat16 or float16. No gradient
            flows. A row with NaN is chosen by none.
        labels: (B,) integers.
        mode: "paper": as above. "official": what the published code finds: pairs left out count
            with cosine 0 instead of being left out, and a hard_pos of 0 becomes i. With
            non-negative features its positives then are no positives.

    Returns:
        hard_pos (B,), hard_neg (B,), int64.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Unleashing the Power of Contrastive Self-Supervised Visual Models via
    Contrast-Regularized Fine-Tuning, arXiv 2102.06605, and its published code.
    """
    check_rows(features, "features")
    labels = check_integers(labels, "labels", features.shape[0], features.device)
    check_choice("mode", mode, ("paper", "official"))
    return HARD_PAIR_INDICES(features.contiguous(), labels, mode == "official")
