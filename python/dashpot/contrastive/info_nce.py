"""The op `info_nce`: cross entropy of cosine similarities, in one direction or both."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dashpot._arrays import public
from dashpot._dispatch import declare
from dashpot.contrastive._pairs import (
    PAIR_SIZES,
    REDUCTIONS,
    bytes_of,
    check_bool,
    check_choice,
    check_integers,
    check_number,
    check_rows,
    project,
    random_views,
    reduced,
    unit_rows,
    wide,
)


def factor_of(logit_scale: Tensor | None, temperature: float, like: Tensor) -> Tensor | float:
    """What cosines are multiplied by: 1 / temperature, or the given scale as ()."""
    return 1 / temperature if logit_scale is None else logit_scale.to(like.dtype).reshape(())


def picked(similarity: Tensor, positives: Tensor | None) -> tuple[Tensor, Tensor]:
    """(s_i,pos(i) (B,), whether the positive is among the keys (B,)); a position < 0 is not."""
    count, keys = similarity.shape
    if positives is None:
        positives = torch.arange(count, device=similarity.device)
    there = (positives >= 0) & (positives < keys)
    if keys == 0:
        return similarity.new_zeros(count), there
    at = positives.clamp(0, keys - 1)[:, None]  # (B, 1)
    return torch.where(there, similarity.gather(1, at)[:, 0], 0), there


def _info_nce_reference(
    query: Tensor, key: Tensor, positives: Tensor | None, logit_scale: Tensor | None,
    temperature: float, symmetric: bool, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """s = c u v^T (B, N); loss_i = log sum_j e^{s_ij} - s_i,pos(i); symmetric: the mean of this
    and the same of s^T. Also the log-sums of the rows (B,) and, if symmetric, of the columns (N,).
    """
    u = unit_rows(query) if normalize else wide(query)  # (B, D)
    v = unit_rows(key) if normalize else wide(key)  # (N, D)
    s = (u @ v.mT) * factor_of(logit_scale, temperature, u)  # (B, N)
    lse = torch.logsumexp(s, 1)  # (B,)
    positive, _ = picked(s, positives)  # (B,)
    if not symmetric:
        return lse - positive, lse, lse[:0]
    lse_key = torch.logsumexp(s, 0)  # (N,)
    return 0.5 * (lse + lse_key) - positive, lse, lse_key


def _info_nce_backward(
    grad_loss: Tensor, query: Tensor, key: Tensor, positives: Tensor | None,
    logit_scale: Tensor | None, lse: Tensor, lse_key: Tensor, temperature: float, symmetric: bool,
    normalize: bool, needs_grad: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """S_ij = g_i (e^{s_ij - lse_i} - 1[j = pos(i)]), symmetric: half of this and of its like by
    columns; du = c S v, dv = c S^T u, dc = sum S_ij u_i.v_j."""
    u = unit_rows(query) if normalize else wide(query)  # (B, D)
    v = unit_rows(key) if normalize else wide(key)  # (N, D)
    c = factor_of(logit_scale, temperature, u)
    cosine = u @ v.mT  # (B, N)
    s = cosine * c
    g = grad_loss.to(u.dtype)  # (B,)
    weights = g[:, None] * torch.exp(s - lse[:, None])  # (B, N)
    if symmetric:
        weights = 0.5 * (weights + g[None, :] * torch.exp(s - lse_key[None, :]))
    if positives is None:
        positives = torch.arange(s.shape[0], device=s.device)
    columns = torch.arange(s.shape[1], device=s.device)
    weights = torch.where(positives[:, None] == columns[None, :], weights - g[:, None], weights)
    grad_query = grad_key = grad_scale = None
    if needs_grad[0]:
        grad_u = c * (weights @ v)  # (B, D)
        grad_query = project(grad_u, query) if normalize else grad_u.to(query.dtype)
    if needs_grad[1]:
        grad_v = c * (weights.mT @ u)  # (N, D)
        grad_key = project(grad_v, key) if normalize else grad_v.to(key.dtype)
    if logit_scale is not None and needs_grad[3]:
        grad_scale = (weights * cosine).sum().to(logit_scale.dtype).reshape(logit_scale.shape)
    return grad_query, grad_key, grad_scale


def _info_nce_inputs(size, dtype, device, seed):
    """Odd batches with a learnable scale and both directions, even ones with neither."""
    query, key = random_views(size, dtype, device, seed)
    both = size[0] % 2 == 1
    scale = torch.tensor(5.0, dtype=dtype, device=device) if both else None
    positives = None if both else torch.arange(size[0], device=device).flip(0)
    return query, key, positives, scale, 0.2, both, True


def _info_nce_floor(query, key, positives, logit_scale, temperature, symmetric, normalize):
    """One read of both sides, a number per row; 2 B N D for the products."""
    flops = 2 * query.shape[0] * key.shape[0] * query.shape[1]
    return bytes_of(query, key, positives) + 4 * query.shape[0] + 4, flops


INFO_NCE = declare(
    "info_nce",
    forward="(Tensor query, Tensor key, Tensor? positives, Tensor? logit_scale, float temperature,"
    " bool symmetric, bool normalize) -> (Tensor loss, Tensor lse, Tensor lse_key)",
    backward="(Tensor grad_loss, Tensor query, Tensor key, Tensor? positives, Tensor? logit_scale,"
    " Tensor lse, Tensor lse_key, float temperature, bool symmetric, bool normalize,"
    " bool[] needs_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_logit_scale)",
    reference=_info_nce_reference,
    reference_backward=_info_nce_backward,
    inputs=_info_nce_inputs,
    floor=_info_nce_floor,
    sizes=PAIR_SIZES,
    public=1,
)


def check_scale(logit_scale, device: torch.device) -> None:
    if logit_scale is None:
        return
    if not isinstance(logit_scale, Tensor):
        raise TypeError(f"logit_scale: expected a torch.Tensor, got {type(logit_scale).__name__}")
    if not logit_scale.is_floating_point() or logit_scale.numel() != 1:
        raise ValueError(
            f"logit_scale: expected one floating number () or (1,), "
            f"got {tuple(logit_scale.shape)} {logit_scale.dtype}"
        )
    if logit_scale.device != device:
        raise ValueError(f"logit_scale: expected a tensor on {device}, got {logit_scale.device}")


@public
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float = 0.04,
    positives: Tensor | None = None,
    symmetric: bool = False,
    normalize: bool = True,
    logit_scale: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    group=None,
) -> Tensor:
    r"""InfoNCE over in-batch or gathered keys, without the matrix of logits.

    .. math:: L_i = \log \sum_j e^{s_{ij}} - s_{i,pos(i)}, \qquad s_{ij} = u_i \cdot v_j / \tau

    Args:
        query: (B, D) float64, float32, bfloat16 or float16; u are its normalised rows.
        key: (N, D) of the same dtype; v are its normalised rows. A zero row stays zero: its
            logits are 0 and its gradient is divided by 1e-12.
        temperature: tau > 0 (0.04: the preset of the published code).
        positives: (B,) integers, the key of each query; default 0, 1, ..., B - 1. May repeat.
        symmetric: the mean of the loss and of that of keys over queries (the CLIP loss); takes
            N = B and no `positives`.
        normalize: False takes the rows as they are.
        logit_scale: () or (1,), 1 / tau as a tensor, learnable; `temperature` is then not used.
        reduction: "mean", "sum" or "none".
        group: a `torch.distributed` process group: rows are local, keys of all its ranks are
            gathered, and the loss is that of the local rows. Gradients are summed over the ranks,
            so that gradients averaged as by DDP are those of the mean over all rows.

    Returns:
        () or, for "none", (B,); float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On CUDA a
            position out of range is an assertion on the device: the host does not wait for it.

    Source: van den Oord et al., arXiv 1807.03748; defaults of arXiv 2312.05409's published code.
    """
    check_rows(query, "query")
    check_rows(key, "key", query)
    check_bool("symmetric", symmetric)
    check_bool("normalize", normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    check_scale(logit_scale, query.device)
    temperature = check_number(temperature, "temperature")
    if positives is not None:
        if symmetric:
            raise ValueError("positives: expected None with symmetric=True, got a tensor")
        positives = check_integers(positives, "positives", query.shape[0], query.device)
    b, keys = query.shape[0], key.shape[0]
    query, key = query.contiguous(), key.contiguous()
    if symmetric and keys != b:
        raise ValueError(f"key: expected ({b}, D) with symmetric=True, got {tuple(key.shape)}")
    if group is None:
        _check_positives(positives, b, keys)
        loss = INFO_NCE(query, key, positives, logit_scale, temperature, symmetric, normalize)
    else:
        from dashpot.contrastive._distributed import gathered_info_nce

        if positives is None and keys != b:
            raise ValueError(f"positives: expected ({b},) for {keys} keys per rank, got None")
        loss = gathered_info_nce(
            query, key, positives, logit_scale, temperature, symmetric, normalize, group
        )
    return reduced(loss, reduction)


def _check_positives(positives: Tensor | None, b: int, keys: int) -> None:
    if positives is None:
        if keys < b:
            raise ValueError(f"key: expected at least {b} rows without positives, got {keys}")
        return
    if positives.device.type == "cuda":  # no answer from there without waiting
        torch._assert_async(((positives >= 0) & (positives < keys)).all())
    elif not torch.compiler.is_compiling() and positives.numel():
        least, most = positives.min().item(), positives.max().item()
        if least < 0 or most >= keys:
            raise ValueError(
                f"positives: expected keys from 0 to {keys - 1}, got {least if least < 0 else most}"
            )


@public
def ring_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    group,
    temperature: float = 0.04,
    symmetric: bool = False,
    normalize: bool = True,
    logit_scale: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""`info_nce` with `group` whose keys travel round a ring of ranks instead of being gathered.

    A rank holds one block of keys at a time, so its memory does not grow with the number of ranks;
    the rows' log-sums merge by :math:`\log(e^a + e^b)`.

    Args:
        query: (B, D) the rank's rows; B is the same on every rank.
        key: (B, D) the rank's keys; the positive of row i is the rank's own key i.
        group: a `torch.distributed` process group; None is the default one.
        temperature: as in `info_nce`.
        symmetric: as in `info_nce`; the keys' side goes round a second time.
        normalize: as in `info_nce`.
        logit_scale: () or (1,), as in `info_nce`.
        reduction: "mean", "sum" or "none", over the local rows.

    Returns:
        () or (B,), as `info_nce` with `group`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    from dashpot.contrastive._distributed import ring_rows

    check_rows(query, "query")
    check_rows(key, "key", query, same_count=True)
    check_bool("symmetric", symmetric)
    check_bool("normalize", normalize)
    check_choice("reduction", reduction, REDUCTIONS)
    check_scale(logit_scale, query.device)
    temperature = check_number(temperature, "temperature")
    u, v = (unit_rows(query), unit_rows(key)) if normalize else (wide(query), wide(key))
    loss = ring_rows(u, v, logit_scale, temperature, group)
    if symmetric:
        loss = 0.5 * (loss + ring_rows(v, u, logit_scale, temperature, group))
    return reduced(loss, reduction)
