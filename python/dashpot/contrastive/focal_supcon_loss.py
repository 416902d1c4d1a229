"""The op `focal_supcon_loss`: supervised contrastive loss with focal weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._grouped import GROUP_SIZES, rows_of
from dashpot.contrastive._pairs import (
    REDUCTIONS,
    bytes_of,
    check_bool,
    check_choice,
    check_integers,
    check_number,
    check_rows,
    project,
    unit_rows,
    wide,
)


def _pairs(u: Tensor, groups: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p (N, N) with 0 on the diagonal, who is a positive of whom (N, N), positives per row
    (N,) and lse (N,), 0 for a row without positives."""
    own = torch.eye(u.shape[0], dtype=torch.bool, device=u.device)
    same = (groups[:, None] == groups[None, :]) & ~own  # (N, N)
    count = same.sum(1)  # (N,)
    s = (u @ u.mT) / temperature  # (N, N)
    # A lonely row (all of them, if N = 1) takes no part: kept finite, and no gradient.
    lonely = (count == 0)[:, None]
    lse = torch.where(lonely | own, -torch.inf, s).where(~lonely, 0).logsumexp(1)
    lse = torch.where(count > 0, lse, 0)
    log_p = torch.where(same, s - lse[:, None], 0)  # (N, N), positives only
    return log_p, same, count, lse


def _focus(log_p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(1 - p)^gamma and its factor in the derivative, gamma (1 - p)^(gamma - 1)."""
    if gamma == 0:
        return torch.ones_like(log_p), torch.zeros_like(log_p)
    # At p = 1 a power below 1 has no derivative; next to it the products below go to 0.
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny)
    return rest**gamma, gamma * rest ** (gamma - 1)


def _focal_supcon_loss_reference(
    z: Tensor, groups: Tensor, temperature: float, gamma: float, by_count: bool, all_anchors: bool,
    normalize: bool, reduction: str, with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """l_i = -1/M_i sum_{j in P(i)} (1 - p_ij)^gamma log p_ij, p_ij = exp(s_ij - lse_i), lse_i over
    k != i, M_i = |P(i)| ("count") or N ("batch"); the mean is over rows with a positive.

    Also returns lse (N,) and pull (N,), h_i = sum_{j in P(i)} of the derivative of
    -(1 - p)^gamma log p by log p, both 0 where there is no positive: what the backward
    needs of the forward. Last, with_gradient, the gradient itself of a loss that is one number,
    (N, d) in the dtype of the sums; else (0, d).
    """
    u = unit_rows(z) if normalize else wide(z)  # (N, d)
    log_p, same, count, lse = _pairs(u, groups, temperature)
    weight, slope = _focus(log_p, gamma)
    pull = torch.where(same, slope * log_p.exp() * log_p - weight, 0).sum(1)  # (N,)
    share = count.clamp(min=1) if by_count else max(z.shape[0], 1)
    loss = -torch.where(same, weight * log_p, 0).sum(1) / share  # (N,)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (max(z.shape[0], 1) if all_anchors else (count > 0).sum().clamp(min=1))
    rows = wide(z.detach())
    if with_gradient:
        rows = _focal_supcon_loss_backward(
            torch.ones_like(loss.detach()), rows, groups, lse.detach(), pull.detach(), rows[:0],
            temperature, gamma, by_count, all_anchors, normalize, reduction, False,
        )  # fmt: skip
    return loss, lse, pull, rows if with_gradient else rows[:0].clone()


def _focal_supcon_loss_backward(
    grad_loss: Tensor, z: Tensor, groups: Tensor, lse: Tensor, pull: Tensor, unit_grad: Tensor,
    temperature: float, gamma: float, by_count: bool, all_anchors: bool, normalize: bool,
    reduction: str, with_gradient: bool,
) -> Tensor:  # fmt: skip
    """S_ij = w_i (e_ij [j in P(i)] - p_ij h_i) / temperature, dU = (S + S^T) U; w_i is what the
    reduction gives row i. with_gradient: what the forward formed, times the incoming number."""
    if with_gradient:
        return (grad_loss * unit_grad).to(z.dtype)
    n = z.shape[0]
    u = unit_rows(z) if normalize else wide(z)
    log_p, same, count, _ = _pairs(u, groups, temperature)
    weight, slope = _focus(log_p, gamma)
    w = wide(grad_loss).expand(n) / (count.clamp(min=1) if by_count else max(n, 1))  # (N,)
    if reduction == "mean":
        w = w / (max(n, 1) if all_anchors else (count > 0).sum().clamp(min=1))
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    out = own | (count == 0)[:, None]
    p = torch.where(out, -torch.inf, (u @ u.mT) / temperature - lse[:, None]).exp()  # (N, N)
    s = torch.where(same, slope * log_p.exp() * log_p - weight, 0) - p * pull[:, None]
    s = s * w[:, None] / temperature
    grad_u = (s + s.mT) @ u
    return project(grad_u, z) if normalize else grad_u.to(z.dtype)


def _focal_supcon_loss_fake(z, groups, temperature, gamma, by_count, all_anchors, normalize,
                            reduction, with_gradient):  # fmt: skip
    n, sums = z.shape[0], torch.float64 if z.dtype == torch.float64 else torch.float32
    loss = z.new_empty((n,) if reduction == "none" else (), dtype=sums)
    lse, pull = z.new_empty((n,), dtype=sums), z.new_empty((n,), dtype=sums)
    return loss, lse, pull, z.new_empty((n if with_gradient else 0, z.shape[1]), dtype=sums)


def _focal_supcon_loss_inputs(size, dtype, device, seed):
    """Odd sizes normalise and take the mean over all columns; even ones come normalised. The
    sizes 7 and 40 columns leave the gradient to the backward."""
    n = size[-2]
    z, groups = rows_of(size, dtype, device, seed)
    if n % 2 == 0:
        z = unit_rows(z).to(dtype)
    gamma = {33: 1.5, 64: 2.0}.get(n, 1.0)
    return z, groups, 0.2, gamma, n % 2 == 0, False, n % 2 == 1, "mean", n != 7 and size[-1] != 40


def _focal_supcon_loss_floor(z, groups, *_):
    """One read of the rows and their groups; a multiply-add per pair and coordinate."""
    n, d = z.shape
    return bytes_of(z, groups) + 4, 2 * n * n * d


FOCAL_SUPCON_LOSS = declare(
    "focal_supcon_loss",
    forward="(Tensor z, Tensor groups, float temperature, float gamma, bool by_count,"
    " bool all_anchors, bool normalize, str reduction, bool with_gradient)"
    " -> (Tensor loss, Tensor lse, Tensor pull, Tensor unit_grad)",
    backward="(Tensor grad_loss, Tensor z, Tensor groups, Tensor lse, Tensor pull,"
    " Tensor unit_grad, float temperature, float gamma, bool by_count, bool all_anchors,"
    " bool normalize, str reduction, bool with_gradient) -> (Tensor grad_z)",
    reference=_focal_supcon_loss_reference,
    reference_backward=_focal_supcon_loss_backward,
    fake=_focal_supcon_loss_fake,
    inputs=_focal_supcon_loss_inputs,
    floor=_focal_supcon_loss_floor,
    sizes=GROUP_SIZES,
    public=1,
)


@public
def focal_supcon_loss(
    z: Tensor,
    groups: Tensor,
    *,
    temperature: float = 0.07,
    gamma: float = 1.0,
    positives_norm: Literal["batch", "count"] = "batch",
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""Supervised contrastive loss with focal weights, without the N x N matrix.

    With :math:`s_{ij} = z_i \cdot z_j / \tau`, :math:`p_{ij} = e^{s_{ij}} / \sum_{k \ne i}
    e^{s_{ik}}` and :math:`P(i)` the other rows of i's group,

    .. math:: \ell_i = -\frac{1}{M_i} \sum_{j \in P(i)} (1 - p_{ij})^\gamma \log p_{ij},
              \qquad L = \frac{1}{N_+} \sum_i \ell_i,

    :math:`N_+` rows having a positive. The weight is differentiated too. Rows whose group is theirs
    alone are negatives only.

    Args:
        z: (N, d) rows; float64, float32, bfloat16 or float16. Expected to have length 1, as in the
            official code; any length is computed as it is.
        groups: (N,) integers; rows with equal ones are positives of each other.
        temperature: tau > 0 (official: 0.07).
        gamma: focal exponent >= 0; 0 is the supervised contrastive loss (official: 1).
        positives_norm: "batch": :math:`M_i = N` (official code); "count": :math:`M_i = |P(i)|`
            (paper). They differ by a factor that grows with N: weights are not transferable.
        normalize: divide each row by its length first (1e-12 at least).
        reduction: "mean" (over rows with a positive), "sum" or "none".

    Returns:
        The loss () or, for "none", (N,) with 0 for rows without a positive; float32, or
        float64 for float64 inputs. Without any positive: 0 with zero gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: a second derivative was asked of a kernel; the reference has one.

    Source: Unleashing the Power of Contrastive Self-Supervised Visual Models via
    Contrast-Regularized Fine-Tuning, arXiv 2102.06605; defaults of its published code.
    """
    check_choice("positives_norm", positives_norm, ("batch", "count"))
    return _focal_supcon(z, groups, "groups", temperature, gamma, positives_norm == "count", False,
                         normalize, reduction)  # fmt: skip


def _focal_supcon(z, groups, name, temperature, gamma, by_count, all_anchors, normalize, reduction):
    """The checks and the call; the losses made of this op pass through here."""
    check_rows(z, "z")
    groups = check_integers(groups, name, z.shape[0], z.device)
    temperature = check_number(temperature, "temperature")
    gamma = check_number(gamma, "gamma", strict=False)
    check_bool("normalize", normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    with_gradient = torch.is_grad_enabled() and z.requires_grad and reduction != "none"
    return FOCAL_SUPCON_LOSS(z.contiguous(), groups, temperature, gamma, by_count, all_anchors,
                             normalize, reduction, with_gradient)  # fmt: skip
