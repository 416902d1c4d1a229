"""The op `consistency_loss`: two stochastic passes' cross entropies and their symmetric KL."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.aggregate._rows import bytes_of, check_choice, check_tensor
from dashpot.experts._plan import check_like, random_matrix, work_dtype

REDUCTIONS = ("mean", "sum", "none")


def _consistency_loss_reference(
    logits1: Tensor, logits2: Tensor, target: Tensor, alpha: float, label_smoothing: float,
    ignore_index: int, reduction: str, early: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """CE1 + CE2 + alpha J a row, J = 1/2 sum_v (p - q) D, D = log p - log q = (z1 - z2) - (lse1 -
    lse2). Also (M, 4) lse1, lse2, KL(p||q), KL(q||p) and, if early, both gradients (M, V)."""
    keep = target != ignore_index  # (M,)
    label = torch.where(keep, target, 0)[:, None]  # (M, 1)
    z1, z2 = (logits.to(work_dtype(logits.dtype)) for logits in (logits1, logits2))  # (M, V)
    lse1, lse2 = z1.logsumexp(1), z2.logsumexp(1)  # (M,)
    log_p, log_q, p, q, gap = _pair(z1, z2, lse1, lse2)
    kl_pq = torch.where(p == 0, 0, p * gap).sum(1)
    kl_qp = torch.where(q == 0, 0, -q * gap).sum(1)
    rows = alpha * 0.5 * torch.where(p == q, 0, (p - q) * gap).sum(1)
    for log in (log_p, log_q):
        rows = rows - (1 - label_smoothing) * log.gather(1, label)[:, 0]
        if label_smoothing:
            rows = rows - label_smoothing * log.mean(1)
    rows = torch.where(keep, rows, 0)  # (M,)
    stats = torch.stack([lse1, lse2, kl_pq, kl_qp], 1).detach()
    if reduction == "none":
        loss = rows
    else:
        loss = rows.sum() / (keep.sum().clamp(min=1) if reduction == "mean" else 1)
    early1, early2 = logits1[:0], logits2[:0]
    if early:
        early1, early2 = _gradients(
            torch.ones_like(loss), logits1, logits2, target, stats, alpha, label_smoothing,
            ignore_index, reduction,
        )  # fmt: skip
    return loss, stats, early1, early2


def _pair(z1, z2, lse1, lse2) -> tuple[Tensor, ...]:
    """log p, log q, p, q, D (M, V); where both are -inf, D is 0."""
    log_p, log_q = z1 - lse1[:, None], z2 - lse2[:, None]
    gap = (z1 - z2) - (lse1 - lse2)[:, None]
    both = (z1 == -torch.inf) & (z2 == -torch.inf)
    return log_p, log_q, log_p.exp(), log_q.exp(), torch.where(both, 0, gap)


def _gradients(
    grad_loss: Tensor, logits1: Tensor, logits2: Tensor, target: Tensor, stats: Tensor,
    alpha: float, label_smoothing: float, ignore_index: int, reduction: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz1 = p - t + alpha/2 (p (D - KL(p||q)) + p - q), dz2 = q - t + alpha/2 (q (-D - KL(q||p)) +
    q - p) with t = (1 - s) onehot + s/V; rows of the ignored index 0."""
    keep = target != ignore_index
    scale = torch.where(keep, grad_loss.to(stats.dtype), 0)  # (M,)
    if reduction == "mean":
        scale = scale / keep.sum().clamp(min=1)
    label = torch.where(keep, target, 0)[:, None]
    z1, z2 = (logits.to(stats.dtype) for logits in (logits1, logits2))
    lse1, lse2, kl_pq, kl_qp = stats.unbind(1)
    _, _, p, q, gap = _pair(z1, z2, lse1, lse2)
    wanted = torch.full_like(p, label_smoothing / max(1, p.shape[1]))
    share = torch.full_like(label, 1, dtype=p.dtype) * (1 - label_smoothing)
    wanted = wanted.scatter_add(1, label, share)
    first = torch.where(p == 0, 0, p * (gap - kl_pq[:, None])) + p - q
    second = torch.where(q == 0, 0, q * (-gap - kl_qp[:, None])) + q - p
    row = (scale != 0)[:, None]  # the others' NaN must not leak
    return tuple(
        torch.where(row, scale[:, None] * (prob - wanted + 0.5 * alpha * extra), 0).to(like.dtype)
        for prob, extra, like in ((p, first, logits1), (q, second, logits2))
    )


def _consistency_loss_backward(
    grad_loss: Tensor, logits1: Tensor, logits2: Tensor, target: Tensor, stats: Tensor,
    early1: Tensor, early2: Tensor, alpha: float, label_smoothing: float, ignore_index: int,
    reduction: str, early: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients by their formulas; made in the forward (early), they are only scaled."""
    if early:
        scale = grad_loss[:, None] if reduction == "none" else grad_loss
        return (early1 * scale).to(logits1.dtype), (early2 * scale).to(logits2.dtype)
    return _gradients(
        grad_loss, logits1, logits2, target, stats, alpha, label_smoothing, ignore_index, reduction
    )


def _consistency_loss_fake(
    logits1, logits2, target, alpha, label_smoothing, ignore_index, reduction, early
):
    work, rows = work_dtype(logits1.dtype), logits1.shape[0]
    made = (rows if early else 0, logits1.shape[1])
    return (
        logits1.new_empty((rows,) if reduction == "none" else (), dtype=work),
        logits1.new_empty((rows, 4), dtype=work),
        logits1.new_empty(made),
        logits2.new_empty(made),
    )


def _consistency_loss_inputs(size, dtype, device, seed):
    """size: (alpha, smoothing, reduction, early, M, V)."""
    alpha, smoothing, reduction, early, rows, classes = size
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1::3] = -100
    common = random_matrix(rows, classes, dtype=torch.float32, device=device, seed=seed)

    def near(number):
        other = random_matrix(rows, classes, dtype=torch.float32, device=device, seed=seed + number)
        return (2 * common + 0.5 * other).to(dtype)

    return (
        near(1), near(2), target.to(device), float(alpha), float(smoothing), -100, reduction,
        bool(early),
    )  # fmt: skip


def _consistency_loss_floor(logits1, logits2, target, *options):
    """One read of both logits (and one write of both gradients, if early); two exponentials."""
    passes = 2 if options[-1] else 1
    return passes * bytes_of([logits1, logits2]) + bytes_of([target]) + 4, 20 * logits1.numel()


CONSISTENCY_LOSS = declare(
    "consistency_loss",
    forward="(Tensor logits1, Tensor logits2, Tensor target, float alpha, float label_smoothing,"
    " int ignore_index, str reduction, bool early)"
    " -> (Tensor loss, Tensor stats, Tensor early1, Tensor early2)",
    backward="(Tensor grad_loss, Tensor logits1, Tensor logits2, Tensor target, Tensor stats,"
    " Tensor early1, Tensor early2, float alpha, float label_smoothing, int ignore_index,"
    " str reduction, bool early) -> (Tensor grad_logits1, Tensor grad_logits2)",
    reference=_consistency_loss_reference,
    reference_backward=_consistency_loss_backward,
    fake=_consistency_loss_fake,
    inputs=_consistency_loss_inputs,
    floor=_consistency_loss_floor,
    public=1,
    # one class; each reduction, smoothing, early or late gradients; a SIMD width and a tail; blocks
    # of classes and a tail; no row
    sizes={"test": [(1, 0, "mean", 0, 1, 1), (5, 0.1, "mean", 0, 3, 7), (1, 0, "sum", 1, 4, 17),
                    (0.5, 0.2, "none", 1, 5, 64), (0, 0.1, "none", 0, 6, 33),
                    (1, 0.1, "mean", 1, 9, 1000), (5, 0, "mean", 0, 7, 4133),
                    (1, 0, "mean", 0, 0, 5)],
           "bench": [(1, 0, "mean", 1, 512, 10_000), (1, 0, "mean", 1, 256, 50_257)]},
)  # fmt: skip


@public
def consistency_loss(
    logits1: Tensor,
    logits2: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    gradients: Literal["backward", "forward"] = "backward",
) -> Tensor:
    r"""The two-pass training loss of stochastic experts, both logits read once.

    .. math:: L = CE(z^1, y) + CE(z^2, y) + \alpha J, \quad
        J = \tfrac12 \left( KL(p\|q) + KL(q\|p) \right) = \tfrac12 \sum_v (p_v - q_v) D_v

    with :math:`D = \log p - \log q` in log space: finite where probabilities underflow.

    Args:
        logits1: (..., V) of the first pass, float64, float32, bfloat16 or float16.
        logits2: (..., V) of the second pass, of the same shape and dtype.
        target: (...,) int64 (or int32) classes in [0, V), or ignore_index.
        alpha: weight of J, >= 0 (published code: 1; its IWSLT recipe: 5).
        label_smoothing: s of t = (1 - s) onehot + s / V, in [0, 1] (recipe: 0.1, of fairseq, whose
            epsilon times V / (V - 1) is this s).
        ignore_index: rows with this target count nothing and get no gradient.
        reduction: "mean" over the rows that count (0 where there is none), "sum", or "none".
        gradients: "backward" keeps four numbers a row and makes both gradients in the backward;
            "forward" makes them at once, while the row is in the cache, and keeps them: one read
            of the logits in all, two logits more in memory between forward and backward.

    Returns:
        A scalar, or (...,) for "none", float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. A target
        outside [0, V) raises on the CPU; on CUDA, which is not waited for, its row's loss is NaN.

    Both logits get gradients, :math:`dJ/dz^1 = \tfrac12 [p (D - KL(p\|q)) + p - q]` and the mirror
    image; neither pass is a detached teacher. Note that the cross entropies are summed over the
    passes, where R-Drop averages them.

    Source: arXiv 2110.04260 and its published code, whose probability form gives inf at a gap of
    200 logits and NaN where both passes underflow.
    """
    check_tensor(logits1, "logits1")
    if logits1.dim() < 1 or logits1.shape[-1] == 0:
        raise ValueError(f"logits1: expected (..., V), V >= 1, got {tuple(logits1.shape)}")
    check_like("logits2", logits2, tuple(logits1.shape), logits1)
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a torch.Tensor, got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: expected int64 or int32, got {target.dtype}")
    if target.shape != logits1.shape[:-1] or target.device != logits1.device:
        raise ValueError(
            f"target: expected {tuple(logits1.shape[:-1])} on {logits1.device}, "
            f"got {tuple(target.shape)} on {target.device}"
        )
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("gradients", gradients, ("backward", "forward"))
    for name, value, high in (
        ("alpha", alpha, float("inf")),
        ("label_smoothing", label_smoothing, 1.0),
    ):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not 0 <= value <= high or value == float("inf"):
            raise ValueError(f"{name}: expected a number from 0 to {high}, got {value}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    classes = logits1.shape[-1]
    early = (
        gradients == "forward"
        and torch.is_grad_enabled()
        and (logits1.requires_grad or logits2.requires_grad)
    )
    loss = CONSISTENCY_LOSS(
        logits1.reshape(-1, classes).contiguous(), logits2.reshape(-1, classes).contiguous(),
        target.reshape(-1).long().contiguous(), float(alpha), float(label_smoothing), ignore_index,
        reduction, early,
    )  # fmt: skip
    return loss.reshape(target.shape) if reduction == "none" else loss
