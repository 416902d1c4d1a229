"""The losses over the ranks of a `torch.distributed` group.

Two forms. Gathered: every rank holds the keys of all ranks, (B_all, D). Ring (`ring_info_nce`):
keys travel from rank to rank, each rank holds one block of them at a time, (B, D), and merges its
rows' log-sums: memory does not grow with the number of ranks.

In both a rank's loss is that of its own rows, and the gradient that arrives at a rank's rows is
the sum over all ranks' losses: with gradients averaged over the ranks, as DDP does, that is the
gradient of the mean over all rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dashpot.contrastive.info_nce import INFO_NCE
from dashpot.contrastive.nt_xent import NT_XENT


class _Gather(torch.autograd.Function):
    """Rows of all ranks, (ranks * B, D); backward: the sum over the ranks of what came to ours."""

    @staticmethod
    def forward(ctx, rows: Tensor, group):
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        # Not every backend scatters sums; in float32, since 16-bit sums would lose the small ones.
        total = grad.contiguous() if grad.dtype == torch.float64 else grad.float().contiguous()
        dist.all_reduce(total, group=ctx.group)
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        return total.chunk(ranks)[rank].to(grad.dtype), None


def _check_equal(rows: Tensor, group) -> None:
    """All ranks must hold as many rows as this one: a gather of unequal parts would hang."""
    counts = torch.tensor([rows.shape[0], -rows.shape[0]], device=rows.device)
    dist.all_reduce(counts, dist.ReduceOp.MAX, group=group)
    most, least = counts[0].item(), -counts[1].item()
    if most != least:
        raise ValueError(
            f"group: expected as many rows on every rank, got between {least} and {most}"
        )


def gathered(rows: Tensor, group) -> tuple[Tensor, int]:
    """The rows of all ranks and where this rank's begin among them."""
    _check_equal(rows, group)
    return _Gather.apply(rows, group), dist.get_rank(group) * rows.shape[0]


def gathered_info_nce(query, key, positives, logit_scale, temperature, symmetric, normalize, group):
    """The local rows' losses (B,) with the keys of all ranks. symmetric: also of the local keys
    with all queries. positives: positions among all keys."""
    keys, offset = gathered(key, group)
    if positives is None:
        positives = torch.arange(offset, offset + query.shape[0], device=query.device)
    rows = INFO_NCE(query, keys, positives, logit_scale, temperature, False, normalize)
    if not symmetric:
        return rows
    queries, _ = gathered(query, group)
    columns = INFO_NCE(key, queries, positives, logit_scale, temperature, False, normalize)
    return 0.5 * (rows + columns)


def gathered_nt_xent(z1, z2, ids, temperature, within_view, mask_cross_view, group):
    """The local rows' losses (2B,) with both views of all ranks as keys."""
    key1, offset = gathered(z1, group)
    key2, _ = gathered(z2, group)
    if ids is None:
        ids = torch.arange(offset, offset + z1.shape[0], device=z1.device)
        key_ids = torch.arange(key1.shape[0], device=z1.device)
    else:
        key_ids, _ = gathered(ids, group)
    return NT_XENT(
        z1, z2, key1, key2, ids, key_ids, offset, temperature, within_view, mask_cross_view
    )


# --------------------------------------------------------------------------------------------
# The ring


def _pass_on(block: Tensor, group) -> Tensor:
    """This rank's block to the next rank, the previous rank's block here."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    if group is not None:
        after, before = dist.get_global_rank(group, after), dist.get_global_rank(group, before)
    arriving = torch.empty_like(block)
    send = dist.P2POp(dist.isend, block.contiguous(), after, group)
    receive = dist.P2POp(dist.irecv, arriving, before, group)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return arriving


def _positives(at: int, rank: int, rows: Tensor) -> Tensor:
    """The positives of the rows among the block of rank `at`: their own, or none."""
    own = torch.arange(rows.shape[0], device=rows.device)
    return own if at == rank else torch.full_like(own, -1)


class _Ring(torch.autograd.Function):
    """info_nce of unit rows, keys block by block: (loss (B,))."""

    @staticmethod
    def forward(ctx, u: Tensor, v: Tensor, logit_scale: Tensor | None, temperature: float, group):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        block, lse, loss = v, None, None
        for step in range(ranks):
            at = (rank - step) % ranks
            part, part_lse, _ = INFO_NCE.forward_op(
                u, block, _positives(at, rank, u), logit_scale, temperature, False, False
            )
            if at == rank:
                loss = part - part_lse  # minus the positive's logit
            lse = part_lse if lse is None else torch.logaddexp(lse, part_lse)
            if step + 1 < ranks:
                block = _pass_on(block, group)
        ctx.save_for_backward(u, v, logit_scale, lse)
        ctx.call = temperature, group
        return loss + lse

    @staticmethod
    def backward(ctx, grad: Tensor):
        u, v, logit_scale, lse = ctx.saved_tensors
        temperature, group = ctx.call
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        needs = [True, True, False, logit_scale is not None and ctx.needs_input_grad[2]]
        block, grad_u, grad_scale = v, torch.zeros_like(u), None
        grad_block = torch.zeros_like(v)  # travels with its block, and comes home with it
        for step in range(ranks):
            at = (rank - step) % ranks
            part_u, part_v, part_scale = INFO_NCE.backward_op(
                grad.contiguous(), u, block, _positives(at, rank, u), logit_scale, lse, lse[:0],
                temperature, False, False, needs,
            )  # fmt: skip
            grad_u += part_u
            grad_block += part_v
            if needs[3]:
                grad_scale = part_scale if grad_scale is None else grad_scale + part_scale
            grad_block = _pass_on(grad_block, group)
            if step + 1 < ranks:
                block = _pass_on(block, group)
        return grad_u, grad_block, grad_scale, None, None


def ring_rows(u: Tensor, v: Tensor, logit_scale, temperature: float, group) -> Tensor:
    """Losses (B,) of unit rows u with the keys v of all ranks, one block at a time."""
    _check_equal(u, group)
    return _Ring.apply(u.contiguous(), v.contiguous(), logit_scale, temperature, group)
