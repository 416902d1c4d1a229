"""The op `nt_xent`: two views of a batch against each other and themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._pairs import (
    PAIR_SIZES,
    bytes_of,
    check_bool,
    check_integers,
    check_number,
    check_rows,
    project,
    random_ids,
    random_views,
    reduced,
    unit_rows,
)


def keep_and_positives(
    b: int, n: int, ids: Tensor | None, key_ids: Tensor | None, offset: int, within_view: bool,
    mask_cross_view: bool, device: torch.device,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which of the 2N keys count for each of the 2B rows, and which is its positive: (2B, 2N) bool
    each. offset: key `offset + i` of a view is row i; < 0: none of the rows is among the keys."""
    if ids is None:
        ids = key_ids = torch.arange(b, device=device)
    key_ids = ids if key_ids is None else key_ids
    other = ids[:, None] != key_ids[None, :]  # (B, N)
    itself = torch.arange(b, device=device)[:, None] + offset == torch.arange(n, device=device)
    itself = itself if offset >= 0 else torch.zeros_like(itself)  # (B, N)
    within = other if within_view else torch.zeros_like(other)
    across = other | itself if mask_cross_view else torch.ones_like(other)
    keep = torch.cat([torch.cat([within, across], 1), torch.cat([across, within], 1)])
    none = torch.zeros_like(itself)
    positive = torch.cat([torch.cat([none, itself], 1), torch.cat([itself, none], 1)])
    return keep, positive


def stacked_logits(
    z1: Tensor, z2: Tensor, key1: Tensor | None, key2: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (2B, D), keys (2N, D) and their logits (2B, 2N)."""
    rows = unit_rows(torch.cat([z1, z2]))
    keys = rows if key1 is None else unit_rows(torch.cat([key1, key2]))
    return rows, keys, (rows @ keys.mT) / temperature


def _nt_xent_reference(
    z1: Tensor, z2: Tensor, key1: Tensor | None, key2: Tensor | None, ids: Tensor | None,
    key_ids: Tensor | None, offset: int, temperature: float, within_view: bool,
    mask_cross_view: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """loss_i = log sum_j keep_ij e^{s_ij} - s_i,pos(i) for the 2B rows of both views, and the
    log-sums. Without key1 and key2 the keys are the rows."""
    _, _, s = stacked_logits(z1, z2, key1, key2, temperature)  # (2B, 2N)
    keep, positive = keep_and_positives(
        z1.shape[0], s.shape[1] // 2, ids, key_ids, offset, within_view, mask_cross_view, s.device
    )
    lse = torch.logsumexp(torch.where(keep, s, -torch.inf), 1)  # (2B,)
    return lse - torch.where(positive, s, 0).sum(1), lse


def _nt_xent_backward(
    grad_loss: Tensor, z1: Tensor, z2: Tensor, key1: Tensor | None, key2: Tensor | None,
    ids: Tensor | None, key_ids: Tensor | None, lse: Tensor, offset: int, temperature: float,
    within_view: bool, mask_cross_view: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """S_ij = g_i (keep_ij e^{s_ij - lse_i} - 1[j = pos(i)]); d rows = S keys / tau, d keys =
    S^T rows / tau; where the keys are the rows, the sum of both."""
    rows, keys, s = stacked_logits(z1, z2, key1, key2, temperature)
    keep, positive = keep_and_positives(
        z1.shape[0], s.shape[1] // 2, ids, key_ids, offset, within_view, mask_cross_view, s.device
    )
    share = torch.where(keep, torch.exp(s - lse[:, None]), 0) - positive.to(s.dtype)
    weights = grad_loss.to(s.dtype)[:, None] * share / temperature  # (2B, 2N)
    of_rows, of_keys = weights @ keys, weights.mT @ rows  # (2B, D), (2N, D)
    if key1 is None:
        of_rows = of_rows + of_keys
    grads = [*of_rows.chunk(2), *(of_keys.chunk(2) if key1 is not None else (None, None))]
    return tuple(
        project(grad, z) if need and z is not None else None
        for grad, z, need in zip(grads, (z1, z2, key1, key2), needs_grad[:4], strict=True)
    )


def _nt_xent_inputs(size, dtype, device, seed):
    """Every subset of the options, by the number of rows."""
    z1, z2 = random_views(size, dtype, device, seed)
    ids = random_ids(size[0], device, seed) if size[0] % 3 else None
    return z1, z2, None, None, ids, None, 0, 0.2, size[0] % 4 != 2, size[0] % 2 == 1


def _nt_xent_floor(z1, z2, key1, key2, *_):
    """One read of the views, a number per row; the products of each pair of 2B rows once."""
    rows, keys = 2 * z1.shape[0], 2 * (z1 if key1 is None else key1).shape[0]
    flops = 2 * rows * keys * z1.shape[1] // (2 if key1 is None else 1)
    return bytes_of(z1, z2, key1, key2) + 4 * rows + 4, flops


NT_XENT = declare(
    "nt_xent",
    forward="(Tensor z1, Tensor z2, Tensor? key1, Tensor? key2, Tensor? ids, Tensor? key_ids,"
    " int offset, float temperature, bool within_view, bool mask_cross_view)"
    " -> (Tensor loss, Tensor lse)",
    backward="(Tensor grad_loss, Tensor z1, Tensor z2, Tensor? key1, Tensor? key2, Tensor? ids,"
    " Tensor? key_ids, Tensor lse, int offset, float temperature, bool within_view,"
    " bool mask_cross_view, bool[] needs_grad)"
    " -> (Tensor grad_z1, Tensor grad_z2, Tensor grad_key1, Tensor grad_key2)",
    reference=_nt_xent_reference,
    reference_backward=_nt_xent_backward,
    inputs=_nt_xent_inputs,
    floor=_nt_xent_floor,
    sizes=PAIR_SIZES,
    public=1,
)


@public
def nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    temperature: float = 0.04,
    subject_ids: Tensor | None = None,
    within_view: bool = True,
    mask_cross_view: bool = False,
    group=None,
) -> Tensor:
    r"""NT-Xent of two views, without the matrix of logits; optionally aware of subjects.

    .. math:: L = \frac1{2B} \sum_i \Big[\log \sum_j keep_{ij} e^{s_{ij}} - s_{i,pos(i)}\Big],
        \qquad s_{ij} = u_i \cdot u_j / \tau

    over the 2B rows of both views; the positive of a row is its other view.

    Args:
        z1: (B, D) float64, float32, bfloat16 or float16; normalised by rows.
        z2: (B, D) of the same dtype. Where it comes from a momentum encoder, pass it detached: its
            part of the backward is then left out.
        temperature: tau > 0 (0.04: the preset of the published code).
        subject_ids: (B,) integers. Pairs of one subject within a view are left out, as in the
            published code. Default: every row is a subject of its own.
        within_view: False leaves out all pairs within a view: the loss as the paper prints it.
        mask_cross_view: True leaves out the other view's rows of the same subject as well, except
            the positive.
        group: a `torch.distributed` process group: rows are local, keys (and ids) of all its ranks
            are gathered, the loss is that of the local rows; gradients are summed over the ranks.

    Returns:
        () float32, or float64 for float64 inputs; 0 without rows.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: published code of the wearable-biosignals work (arXiv 2312.05409); Chen et al., SimCLR,
    arXiv 2002.05709.
    """
    z1, z2, ids, temperature = check_views(
        z1, z2, temperature, subject_ids, within_view, mask_cross_view
    )
    if group is not None:
        from dashpot.contrastive._distributed import gathered_nt_xent

        rows = gathered_nt_xent(z1, z2, ids, temperature, within_view, mask_cross_view, group)
    else:
        rows = NT_XENT(z1, z2, None, None, ids, None, 0, temperature, within_view, mask_cross_view)
    return reduced(rows, "mean")


@public
def ring_nt_xent(
    z1: Tensor,
    z2: Tensor,
    *,
    group,
    temperature: float = 0.04,
    subject_ids: Tensor | None = None,
    within_view: bool = True,
    mask_cross_view: bool = False,
) -> Tensor:
    r"""`nt_xent` with `group` whose keys travel round a ring of ranks instead of being gathered.

    A rank holds one block of keys at a time, so its memory does not grow with the number of ranks;
    the rows' log-sums merge by :math:`\log(e^a + e^b)`.

    Args:
        z1: (B, D) the rank's rows; B is the same on every rank.
        z2: (B, D) of the same dtype.
        group: a `torch.distributed` process group; None is the default one.
        temperature: as in `nt_xent`.
        subject_ids: (B,) the rank's, as in `nt_xent`.
        within_view: as in `nt_xent`.
        mask_cross_view: as in `nt_xent`.

    Returns:
        () the loss of the local rows, as `nt_xent` with `group`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    from dashpot.contrastive._distributed import ring_views

    z1, z2, ids, temperature = check_views(
        z1, z2, temperature, subject_ids, within_view, mask_cross_view
    )
    rows = ring_views(z1, z2, ids, temperature, within_view, mask_cross_view, group)
    return reduced(rows, "mean")


def check_views(z1, z2, temperature, subject_ids, within_view, mask_cross_view):
    """The arguments as the ops take them."""
    check_rows(z1, "z1")
    check_rows(z2, "z2", z1, same_count=True)
    check_bool("within_view", within_view)
    check_bool("mask_cross_view", mask_cross_view)
    if subject_ids is not None:
        subject_ids = check_integers(subject_ids, "subject_ids", z1.shape[0], z1.device)
    return z1.contiguous(), z2.contiguous(), subject_ids, check_number(temperature, "temperature")
