"""The op `hard_pair_mixup`: a batch and its random and hard mixtures, with soft labels."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._grouped import grouped_rows
from dashpot.contrastive._pairs import (
    check_bool,
    check_integers,
    check_number,
    check_rows,
    wide,
)
from dashpot.contrastive.hard_pair_indices import HARD_PAIR_INDICES


def _parts(lam_neg, lam_pos, perm, hard_pos, hard_neg):
    """The mixed rows 2B as (1 - t) f_from + t f_to: t, from, to, each (2B,)."""
    own = torch.arange(perm.shape[0], device=perm.device)
    share = torch.cat([lam_neg, lam_pos]).detach()
    return share, torch.cat([own, hard_neg]), torch.cat([perm, hard_pos])


def _hard_pair_mixup_reference(
    features: Tensor, labels: Tensor, perm: Tensor, lam_neg: Tensor, lam_pos: Tensor,
    hard_pos: Tensor, hard_neg: Tensor, num_classes: int, neg_clip: float, detach_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows f_i, then (1 - l_i) f_i + l_i f_perm(i), then m_i f_hp(i) + (1 - m_i) f_hn(i); one-hot
    labels alike. groups: the class of a row that holds one class only; of a random mixture with
    l = neg_clip an id of its two classes, in order; else an id of its own."""
    share, start, end = _parts(lam_neg, lam_pos, perm, hard_pos, hard_neg)
    f = wide(features)  # (B, D)
    t = share.to(f.dtype)[:, None]  # (2B, 1)
    mixed = torch.cat([f.detach() if detach_first else f, (1 - t) * f[start] + t * f[end]])
    classes = torch.arange(num_classes, device=labels.device)
    hot = (labels[:, None] == classes).to(f.dtype)  # (B, K)
    soft = torch.cat([hot, (1 - t) * hot[start] + t * hot[end]])
    # Attached with a gradient of zero, as an output of any op is.
    soft = torch.where(torch.zeros_like(soft, dtype=torch.bool), f.sum(), soft)
    first, last = labels[start], labels[end]
    place = torch.arange(share.shape[0], device=labels.device)
    clipped = (share == neg_clip) & (place < labels.shape[0])
    pair = num_classes * (1 + num_classes) + place
    pair = torch.where(clipped, num_classes * (1 + first) + last, pair)
    one = torch.where(share == 0, first, torch.where((share == 1) | (first == last), last, pair))
    return mixed.to(features.dtype), soft.to(features.dtype), torch.cat([labels, one])


def _hard_pair_mixup_backward(
    grad_mixed: Tensor, perm: Tensor, lam_neg: Tensor, lam_pos: Tensor, hard_pos: Tensor,
    hard_neg: Tensor, detach_first: bool,
) -> Tensor:  # fmt: skip
    """The adjoint: each output row sends its gradient, weighted, to the rows it was made of."""
    share, start, end = _parts(lam_neg, lam_pos, perm, hard_pos, hard_neg)
    b = perm.shape[0]
    g = wide(grad_mixed)  # (3B, D)
    t = share.to(g.dtype)[:, None]
    grad = torch.zeros_like(g[:b]) if detach_first else g[:b]
    grad = grad.index_add(0, start, (1 - t) * g[b:]).index_add(0, end, t * g[b:])
    return grad.to(grad_mixed.dtype)


def _hard_pair_mixup_fake(features, labels, perm, lam_neg, lam_pos, hard_pos, hard_neg, num_classes,
                          neg_clip, detach_first):  # fmt: skip
    b, d = features.shape
    return (
        features.new_empty((3 * b, d)),
        features.new_empty((3 * b, num_classes)),
        labels.new_empty((3 * b,)),
    )


def _hard_pair_mixup_inputs(size, dtype, device, seed):
    """Mixing weights over [0, 1], some of them exactly 0 or 1."""
    b, _ = size
    features, labels = grouped_rows(size, dtype, device, seed)
    labels = (labels + 11) // 7 % 5
    generator = torch.Generator().manual_seed(seed + 1)
    perm = torch.randperm(b, generator=generator).to(device)
    lam = torch.rand(2, b, generator=generator)
    lam[:, ::5] = lam[:, ::5].round()
    lam[0] = lam[0].clamp(min=0.5)
    lam_neg, lam_pos = lam.to(device, features.dtype if dtype == torch.float64 else torch.float32)
    hard_pos, hard_neg = torch.randint(0, max(b, 1), (2, b), generator=generator).to(device)
    return features, labels, perm, lam_neg, lam_pos, hard_pos, hard_neg, 5, 0.5, b % 2 == 0


def _hard_pair_mixup_floor(features, labels, *_):
    """Rows, weights and indices in; three batches of rows, soft labels and groups out."""
    b, d = features.shape
    size = features.element_size()
    return size * b * (4 * d + 3 * 5) + 8 * b * (4 + 3) + 8 * b, 6 * b * d


HARD_PAIR_MIXUP = declare(
    "hard_pair_mixup",
    forward="(Tensor features, Tensor labels, Tensor perm, Tensor lam_neg, Tensor lam_pos,"
    " Tensor hard_pos, Tensor hard_neg, int num_classes, float neg_clip, bool detach_first)"
    " -> (Tensor mixed, Tensor soft, Tensor groups)",
    backward="(Tensor grad_mixed, Tensor perm, Tensor lam_neg, Tensor lam_pos, Tensor hard_pos,"
    " Tensor hard_neg, bool detach_first) -> (Tensor grad_features)",
    reference=_hard_pair_mixup_reference,
    reference_backward=_hard_pair_mixup_backward,
    fake=_hard_pair_mixup_fake,
    inputs=_hard_pair_mixup_inputs,
    floor=_hard_pair_mixup_floor,
    sizes={
        # one row; odd widths below and above a vector; more rows than a block
        "test": [(1, 3), (5, 3), (12, 40), (33, 129), (130, 16)],
        "bench": [(64, 2048), (256, 2048), (4096, 2048)],
    },
)


@public
def hard_pair_mixup(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    alpha: float = 1.0,
    neg_clip: float = 0.8,
    generator: torch.Generator | None = None,
    perm: Tensor | None = None,
    lam_neg: Tensor | None = None,
    lam_pos: Tensor | None = None,
    indices: tuple[Tensor, Tensor] | None = None,
    detach_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The batch, its random mixtures and its hard mixtures: 3B rows with soft labels and groups.

    Rows 0..B-1 are :math:`f_i`; the next B :math:`(1 - l_i) f_i + l_i f_{\pi(i)}`; the last B
    :math:`m_i f_{hp(i)} + (1 - m_i) f_{hn(i)}`. One-hot labels are mixed alike.

    Args:
        features: (B, D) rows; float64, float32, bfloat16 or float16.
        labels: (B,) integers in 0..K-1.
        num_classes: K >= 1.
        alpha: :math:`m_i \sim Beta(\alpha, \alpha)`, :math:`l_i = \max(Beta, neg\_clip)`
            (official: 1).
        neg_clip: least l, in [0, 1] (official: 0.8).
        generator: of the random numbers, on the device of `features`.
        perm: (B,) int64, pi; drawn if None. It may pair rows of one label, or a row with itself.
        lam_neg: (B,) floats in [0, 1], raised to `neg_clip` where they are below; drawn if None.
        lam_pos: (B,) floats m in [0, 1]; drawn if None.
        indices: (hp, hn), two tensors (B,) int64, as from `hard_pair_indices`, which finds them if
            None.
        detach_first: the first B rows send no gradient back (official code).

    Returns:
        mixed (3B, D), soft (3B, K) in the dtype of `features`, groups (3B,) int64: rows with equal
        soft labels share one. A row of one class has that class, every other a number >= K: random
        mixtures of the same two classes share it where l was raised to `neg_clip`, as the release
        finds them equal; all others are alone.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. Values of
        labels and indices are checked on the CPU only: elsewhere that would wait for the device.

    Gradients flow to `features` alone; differentiable twice.

    Source: Unleashing the Power of Contrastive Self-Supervised Visual Models via
    Contrast-Regularized Fine-Tuning, arXiv 2102.06605; defaults of its published code.
    """
    check_rows(features, "features")
    if not isinstance(num_classes, int) or isinstance(num_classes, bool):
        raise TypeError(f"num_classes: expected an int, got {type(num_classes).__name__}")
    if num_classes < 1:
        raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
    b, device = features.shape[0], features.device
    labels = _within(labels, "labels", b, device, num_classes)
    alpha = check_number(alpha, "alpha")
    neg_clip = check_number(neg_clip, "neg_clip", strict=False)
    if neg_clip > 1:
        raise ValueError(f"neg_clip: expected a number in [0, 1], got {neg_clip}")
    check_bool("detach_first", detach_first)
    features = features.contiguous()
    if indices is None:
        indices = HARD_PAIR_INDICES(features.detach(), labels, False)
    elif not isinstance(indices, tuple | list) or len(indices) != 2:
        raise TypeError("indices: expected a pair of tensors (hard_pos, hard_neg)")
    hard_pos, hard_neg = (
        _within(index, name, b, device, b)
        for name, index in zip(("indices[0]", "indices[1]"), indices, strict=True)
    )
    if perm is None:
        perm = torch.randperm(b, generator=generator, device=device)
    else:
        perm = _within(perm, "perm", b, device, b)
    sums = torch.float64 if features.dtype == torch.float64 else torch.float32
    if lam_neg is None:
        lam_neg = _beta(alpha, b, generator, sums, device)
    if lam_pos is None:
        lam_pos = _beta(alpha, b, generator, sums, device)
    lam_neg, lam_pos = (
        _shares(name, lam, features, sums)
        for name, lam in (("lam_neg", lam_neg), ("lam_pos", lam_pos))
    )
    lam_neg = lam_neg.clamp(min=neg_clip)
    mixed, soft, groups = HARD_PAIR_MIXUP(
        features, labels, perm, lam_neg, lam_pos, hard_pos, hard_neg, num_classes, neg_clip,
        detach_first,
    )  # fmt: skip
    return mixed, soft.detach(), groups


def _beta(alpha: float, count: int, generator, dtype: torch.dtype, device) -> Tensor:
    """Beta(alpha, alpha) on the device, (count,)."""
    both = torch.full((count, 2), alpha, dtype=dtype, device=device)
    return torch._sample_dirichlet(both, generator=generator)[:, 0]


def _within(value, name: str, count: int, device: torch.device, limit: int) -> Tensor:
    """(count,) integers in 0..limit-1; values are looked at on the CPU only."""
    ids = check_integers(value, name, count, device)
    if ids.is_cpu and type(ids) is Tensor and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(value) for value in ids.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name}: expected values in 0..{limit - 1}, got {low}..{high}")
    return ids


def _shares(name: str, lam, features: Tensor, dtype: torch.dtype) -> Tensor:
    """Mixing weights as kernels take them: (B,) contiguous, in the dtype of the sums."""
    if not isinstance(lam, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(lam).__name__}")
    if not lam.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {lam.dtype}")
    if tuple(lam.shape) != (features.shape[0],) or lam.device != features.device:
        raise ValueError(
            f"{name}: expected ({features.shape[0]},) on {features.device}, "
            f"got {tuple(lam.shape)} on {lam.device}"
        )
    return lam.detach().to(dtype).contiguous()
