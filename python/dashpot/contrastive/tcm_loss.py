"""The op `tcm_loss`: the mean distance of hard pairs beyond a margin, positives and negatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._grouped import grouped_rows
from dashpot.contrastive._pairs import (
    bytes_of,
    check_bool,
    check_labelled,
    check_number,
    project,
    unit_rows,
    wide,
)


class TcmStats(NamedTuple):
    """What `tcm_loss` found, tensors on the device of the embeddings.

    pairs_pos, pairs_neg: () int64, ordered hard pairs, |S+| and |S-|.
    """

    pairs_pos: Tensor
    pairs_neg: Tensor


def _hard(
    u: Tensor, v: Tensor, labels: Tensor, ref_labels: Tensor, offset: int, margin_pos: float,
    margin_neg: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """s (B, N), and which pairs are in S+ and in S-. NaN counts as hard, so that it shows."""
    s = u @ v.mT  # (B, N)
    same = labels[:, None] == ref_labels[None, :]
    columns = torch.arange(v.shape[0], device=u.device)
    own = torch.arange(u.shape[0], device=u.device)[:, None] + offset == columns
    own = own if offset >= 0 else torch.zeros_like(same)
    return s, same & ~own & ~(s > margin_pos), ~same & ~(s < margin_neg)


def _sides(embeddings, labels, ref_embeddings, ref_labels, normalize):
    u = unit_rows(embeddings) if normalize else wide(embeddings)  # (B, D)
    if ref_embeddings is None:
        return u, u, labels
    return u, unit_rows(ref_embeddings) if normalize else wide(ref_embeddings), ref_labels


def _total(sums: Tensor, counts: Tensor, weight_pos: float, weight_neg: float) -> Tensor:
    """w+ sum+ / |S+| + w- sum- / |S-|, an empty set giving 0; sums (2,), counts (2,) -> ()."""
    means = sums / counts.clamp(min=1).to(sums.dtype)
    return weight_pos * means[0] + weight_neg * means[1]


def _tcm_loss_reference(
    embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None, ref_labels: Tensor | None,
    offset: int, margin_pos: float, margin_neg: float, weight_pos: float, weight_neg: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """s = u v^T; S+ = {same label, s <= m+}, S- = {other label, s >= m-}, without the pairs
    (i, i + offset), offset >= 0; L = w+ mean_{S+} (m+ - s) + w- mean_{S-} (s - m-). Also the
    counts (2,) and the sums (2,) of both."""
    u, v, ids = _sides(embeddings, labels, ref_embeddings, ref_labels, normalize)
    s, pos, neg = _hard(u, v, labels, ids, offset, margin_pos, margin_neg)
    counts = torch.stack([pos.sum(), neg.sum()])  # (2,)
    sums = torch.stack(
        [torch.where(pos, margin_pos - s, 0).sum(), torch.where(neg, s - margin_neg, 0).sum()]
    )
    return _total(sums, counts, weight_pos, weight_neg), counts, sums


def _tcm_loss_backward(
    grad_loss: Tensor, embeddings: Tensor, labels: Tensor, ref_embeddings: Tensor | None,
    ref_labels: Tensor | None, counts: Tensor, offset: int, margin_pos: float, margin_neg: float,
    weight_pos: float, weight_neg: float, normalize: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """G_ij = -w+/|S+| on S+, w-/|S-| on S-; dU = (G + G^T) U, or G V and dV = G^T U."""
    u, v, ids = _sides(embeddings, labels, ref_embeddings, ref_labels, normalize)
    _, pos, neg = _hard(u, v, labels, ids, offset, margin_pos, margin_neg)
    share = grad_loss / counts.clamp(min=1).to(u.dtype)  # (2,)
    g = torch.where(neg, weight_neg * share[1], torch.where(pos, -weight_pos * share[0], 0))
    grad = grad_ref = None

    def back(grad_unit, rows):
        return project(grad_unit, rows) if normalize else grad_unit.to(rows.dtype)

    if needs_grad[0]:
        grad = back(g @ v if ref_embeddings is not None else (g + g.mT) @ u, embeddings)
    if ref_embeddings is not None and needs_grad[2]:
        grad_ref = back(g.mT @ u, ref_embeddings)
    return grad, grad_ref


def _tcm_loss_inputs(size, dtype, device, seed):
    """Odd batches against half as many reference rows and one, even ones against themselves."""
    embeddings, labels = grouped_rows(size, dtype, device, seed)
    ref = ref_labels = None
    if size[0] % 2:
        ref, ref_labels = grouped_rows((size[0] // 2 + 1, size[1]), dtype, device, seed + 1)
    offset = -1 if size[0] % 2 else 0
    return embeddings, labels, ref, ref_labels, offset, 0.9, 0.1, 1.0, 0.5, True


def _tcm_loss_floor(embeddings, labels, ref_embeddings, ref_labels, *_):
    """One read of the rows; a multiply-add per pair (unordered, without references) and
    coordinate."""
    b, d = embeddings.shape
    pairs = b * b if ref_embeddings is None else 2 * b * ref_embeddings.shape[0]
    return bytes_of(embeddings, labels, ref_embeddings, ref_labels) + 4, pairs * d


TCM_LOSS = declare(
    "tcm_loss",
    forward="(Tensor embeddings, Tensor labels, Tensor? ref_embeddings, Tensor? ref_labels,"
    " int offset, float margin_pos, float margin_neg, float weight_pos, float weight_neg,"
    " bool normalize) -> (Tensor loss, Tensor counts, Tensor sums)",
    backward="(Tensor grad_loss, Tensor embeddings, Tensor labels, Tensor? ref_embeddings,"
    " Tensor? ref_labels, Tensor counts, int offset, float margin_pos, float margin_neg,"
    " float weight_pos, float weight_neg, bool normalize, bool[] needs_grad)"
    " -> (Tensor grad_embeddings, Tensor grad_ref_embeddings)",
    reference=_tcm_loss_reference,
    reference_backward=_tcm_loss_backward,
    inputs=_tcm_loss_inputs,
    floor=_tcm_loss_floor,
    sizes={
        # two rows and a reference; below, at and above panels of 64 rows; no row
        "test": [(2, 3), (7, 5), (33, 16), (64, 128), (130, 40), (257, 17), (0, 5)],
        "bench": [(512, 512), (2048, 512), (8192, 128)],
    },
    public=2,
)


@public
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_pos: float = 0.9,
    margin_neg: float = 0.5,
    weight_pos: float = 1.0,
    weight_neg: float = 1.0,
    normalize: bool = True,
    return_stats: bool = False,
    group=None,
) -> Tensor | tuple[Tensor, TcmStats]:
    r"""Threshold-consistent margin loss over all pairs, without a list of pairs or their matrix.

    With :math:`s_{ij}` the cosine, :math:`S^+` the pairs of one label with :math:`s \le m^+` and
    :math:`S^-` those of two labels with :math:`s \ge m^-` (ordered, without (i, i)),

    .. math:: L = \lambda^+ \frac{1}{|S^+|} \sum_{S^+} (m^+ - s)
                + \lambda^- \frac{1}{|S^-|} \sum_{S^-} (s - m^-).

    A regulariser: add it to the loss that trains the embedding.

    Args:
        embeddings: (B, D) rows; float64, float32, bfloat16 or float16.
        labels: (B,) integers.
        ref_embeddings: (N, D) rows that the batch is compared with instead of itself; no pair is
            left out then.
        ref_labels: (N,) integers, given with `ref_embeddings` and only then.
        margin_pos, margin_neg: m+ and m- (0.9 and 0.5: the paper's, by way of
            pytorch-metric-learning).
        weight_pos, weight_neg: lambda+ and lambda-.
        normalize: divide each row by its length first (1e-12 at least); False takes the rows as
            they are.
        return_stats: also return `TcmStats`.
        group: a `torch.distributed` process group: rows are local, as many on each rank; pairs are
            those of all ranks' rows, sums and counts are added over the ranks before the division,
            so each rank gets the loss of the whole batch. Gradients are those of the sum of the
            ranks' losses: averaged over the ranks, as by DDP, they are the whole batch's. Takes no
            references.

    Returns:
        The loss (), float32, or float64 for float64 inputs; an empty set adds 0, attached to the
        graph with zero gradient. NaN rows make it NaN. With `return_stats` (loss, `TcmStats`).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: a second derivative was asked of a kernel; the reference has one.

    The loss jumps where a pair enters or leaves its set; the gradient holds the sets fixed.

    Source: Threshold-Consistent Margin Loss for Open-World Deep Metric Learning,
    arXiv 2307.04047.
    """
    labels, ref_labels = check_labelled(
        embeddings, labels, ref_embeddings, ref_labels, "ref_embeddings"
    )
    if ref_embeddings is not None:
        ref_embeddings = ref_embeddings.contiguous()
    options = (
        _any_number(margin_pos, "margin_pos"),
        _any_number(margin_neg, "margin_neg"),
        _any_number(weight_pos, "weight_pos"),
        _any_number(weight_neg, "weight_neg"),
    )
    check_bool("normalize", normalize)
    check_bool("return_stats", return_stats)
    embeddings = embeddings.contiguous()
    if group is None:
        offset = -1 if ref_embeddings is not None else 0
        loss, counts = TCM_LOSS(
            embeddings, labels, ref_embeddings, ref_labels, offset, *options, normalize
        )
    elif ref_embeddings is not None:
        raise ValueError("group: expected None with ref_embeddings, got a process group")
    else:
        loss, counts = _AcrossRanks.apply(embeddings, labels, options, normalize, group)
    return (loss, TcmStats(counts[0], counts[1])) if return_stats else loss


def _any_number(value, name: str) -> float:
    return check_number(value, name, least=-torch.finfo(torch.float64).max, strict=False)


class _AcrossRanks(torch.autograd.Function):
    """Local rows against the rows of all ranks. A pair and its mirror image have one weight, so
    each rank forms the whole gradient of its rows from its own tiles."""

    @staticmethod
    def forward(ctx, embeddings, labels, options, normalize, group):
        ranks, offset = dist.get_world_size(group), dist.get_rank(group) * embeddings.shape[0]
        rows = embeddings.new_empty((ranks * embeddings.shape[0], embeddings.shape[1]))
        ids = labels.new_empty((rows.shape[0],))
        dist.all_gather_into_tensor(rows, embeddings, group=group)
        dist.all_gather_into_tensor(ids, labels, group=group)
        args = (embeddings, labels, rows, ids)
        _, counts, sums = TCM_LOSS.forward_op(*args, offset, *options, normalize)
        sums = sums.double()
        dist.all_reduce(counts, group=group)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(*args, counts)
        ctx.call = ranks, offset, options, normalize
        ctx.mark_non_differentiable(counts)
        loss = _total(sums, counts, *options[2:])
        return loss.to(wide(embeddings).dtype), counts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        ranks, offset, options, normalize = ctx.call
        needs = [True, False, False, False]
        # Twice: each pair was counted here and, mirrored, at the other row.
        scale = 2 * ranks * grad_loss
        grad, _ = TCM_LOSS.backward_op(
            scale, *ctx.saved_tensors, offset, *options, normalize, needs
        )
        return grad, None, None, None, None


class ThresholdConsistentMarginLoss(nn.Module):
    """`tcm_loss` as a Module, with the names of pytorch-metric-learning's.

    Args:
        lambda_plus, lambda_minus, margin_plus, margin_minus: see `tcm_loss`.
        base_loss: called as base_loss(embeddings, labels); its value is added, so that this is the
            total of the paper.
        group: see `tcm_loss`.
    """

    def __init__(self, lambda_plus: float = 1.0, lambda_minus: float = 1.0,
                 margin_plus: float = 0.9, margin_minus: float = 0.5, *,
                 base_loss: Callable | None = None, group=None):  # fmt: skip
        super().__init__()
        self.lambda_plus = _any_number(lambda_plus, "lambda_plus")
        self.lambda_minus = _any_number(lambda_minus, "lambda_minus")
        self.margin_plus = _any_number(margin_plus, "margin_plus")
        self.margin_minus = _any_number(margin_minus, "margin_minus")
        if base_loss is not None and not callable(base_loss):
            raise TypeError(f"base_loss: expected a callable, got {type(base_loss).__name__}")
        self.base_loss, self.group = base_loss, group

    def forward(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor | None = None,
                ref_labels: Tensor | None = None) -> Tensor:  # fmt: skip
        """embeddings (B, D), labels (B,), ref_emb (N, D), ref_labels (N,) -> loss ()"""
        loss = tcm_loss(
            embeddings, labels, ref_emb, ref_labels, margin_pos=self.margin_plus,
            margin_neg=self.margin_minus, weight_pos=self.lambda_plus,
            weight_neg=self.lambda_minus, group=self.group,
        )  # fmt: skip
        return loss if self.base_loss is None else loss + self.base_loss(embeddings, labels)

    def extra_repr(self) -> str:
        return (
            f"lambda_plus={self.lambda_plus:g}, lambda_minus={self.lambda_minus:g}, "
            f"margin_plus={self.margin_plus:g}, margin_minus={self.margin_minus:g}"
        )
