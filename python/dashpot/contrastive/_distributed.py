"""The losses over the ranks of a `torch.distributed` group.

Two forms. Gathered: every rank holds the keys of all ranks, (B_all, D). Ring (`ring_info_nce`,
`ring_nt_xent`, `ring_koleo_loss`): keys travel from rank to rank, each rank holds one block of them
at a time, (B, D), and merges its rows' log-sums or neighbours: memory does not grow with the number
of ranks.

In both a rank's loss is that of its own rows, and the gradient that arrives at a rank's rows is
the sum over all ranks' losses: with gradients averaged over the ranks, as DDP does, that is the
gradient of the mean over all rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dashpot.contrastive._pairs import wide
from dashpot.contrastive.info_nce import INFO_NCE
from dashpot.contrastive.koleo_loss import KOLEO_LOSS, gap_loss, gap_pull
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


class _InfoNceBlock:
    """`info_nce` of unit rows (1, B, D) with one block of keys (1, B, D)."""

    def __init__(self, temperature: float):
        self.temperature = temperature

    @staticmethod
    def _positives(rows: Tensor, own: bool) -> Tensor:
        at = torch.arange(rows.shape[1], device=rows.device)
        return at if own else torch.full_like(at, -1)

    def forward(self, rows, scale, ids, keys, key_ids, own: bool) -> tuple[Tensor, Tensor]:
        loss, lse, _ = INFO_NCE.forward_op(
            rows[0], keys[0], self._positives(rows, own), scale, self.temperature, False, False
        )
        return loss, lse

    def backward(self, grad, rows, scale, ids, keys, key_ids, own: bool, lse, needs_scale: bool):
        by_rows, by_keys, by_scale = INFO_NCE.backward_op(
            grad, rows[0], keys[0], self._positives(rows, own), scale, lse, lse[:0],
            self.temperature, False, False, [True, True, False, needs_scale],
        )  # fmt: skip
        return by_rows[None], by_keys[None], by_scale


class _NtXentBlock:
    """`nt_xent` of both views (2, B, D) with one block of keys of both views (2, B, D)."""

    def __init__(self, *options):
        self.options = options  # temperature, within_view, mask_cross_view

    def forward(self, rows, scale, ids, keys, key_ids, own: bool) -> tuple[Tensor, Tensor]:
        offset = 0 if own else -1
        return NT_XENT.forward_op(*rows, *keys, ids, key_ids, offset, *self.options)

    def backward(self, grad, rows, scale, ids, keys, key_ids, own: bool, lse, needs_scale: bool):
        offset = 0 if own else -1
        grads = NT_XENT.backward_op(
            grad, *rows, *keys, ids, key_ids, lse, offset, *self.options, [True] * 4
        )
        return torch.stack(grads[:2]), torch.stack(grads[2:]), None


class _Ring(torch.autograd.Function):
    """Losses of the rows (V, B, D), keys (V, B, D) and their ids (B,) going round in blocks."""

    @staticmethod
    def forward(ctx, rows, keys, scale: Tensor | None, ids: Tensor, block, group):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        here, here_ids, lse, loss = keys, ids, None, None
        for step in range(ranks):
            own = (rank - step) % ranks == rank
            part, part_lse = block.forward(rows, scale, ids, here, here_ids, own)
            if own:
                loss = part - part_lse  # minus the positive's logit
            lse = part_lse if lse is None else torch.logaddexp(lse, part_lse)
            if step + 1 < ranks:
                here, here_ids = _pass_on(here, group), _pass_on(here_ids, group)
        ctx.save_for_backward(rows, keys, scale, ids, lse)
        ctx.call = block, group
        return loss + lse

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, keys, scale, ids, lse = ctx.saved_tensors
        block, group = ctx.call
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        needs_scale = scale is not None and ctx.needs_input_grad[2]
        here, here_ids = keys, ids
        grad_rows, grad_scale = torch.zeros_like(rows), None
        grad_here = torch.zeros_like(keys)  # travels with its block, and comes home with it
        for step in range(ranks):
            own = (rank - step) % ranks == rank
            by_rows, by_keys, by_scale = block.backward(
                grad.contiguous(), rows, scale, ids, here, here_ids, own, lse, needs_scale
            )
            grad_rows += by_rows
            grad_here += by_keys
            if needs_scale:
                grad_scale = by_scale if grad_scale is None else grad_scale + by_scale
            grad_here = _pass_on(grad_here, group)
            if step + 1 < ranks:
                here, here_ids = _pass_on(here, group), _pass_on(here_ids, group)
        return grad_rows, grad_here, grad_scale, None, None, None


def ring_rows(u: Tensor, v: Tensor, logit_scale, temperature: float, group) -> Tensor:
    """Losses (B,) of unit rows u with the keys v of all ranks, one block at a time."""
    _check_equal(u, group)
    ids = torch.arange(u.shape[0], device=u.device)
    return _Ring.apply(u[None].contiguous(), v[None].contiguous(), logit_scale, ids,
                       _InfoNceBlock(temperature), group)  # fmt: skip


def ring_views(z1, z2, ids, temperature, within_view, mask_cross_view, group) -> Tensor:
    """Losses (2B,) of both views' rows with both views of all ranks, one block at a time."""
    _check_equal(z1, group)
    if ids is None:
        offset = dist.get_rank(group) * z1.shape[0]
        ids = torch.arange(offset, offset + z1.shape[0], device=z1.device)
    views = torch.stack([wide(z1), wide(z2)])  # (2, B, D)
    return _Ring.apply(views, views, None, ids, _NtXentBlock(temperature, within_view,
                       mask_cross_view), group)  # fmt: skip


def ring_size(rows: Tensor, group) -> int:
    """Rows of all ranks together, as many on each."""
    _check_equal(rows, group)
    return rows.shape[0] * dist.get_world_size(group)


class _RingNeighbours(torch.autograd.Function):
    """KoLeo losses (B,) of rows u (B, D) with their K nearest among the rows of all ranks."""

    @staticmethod
    def forward(ctx, u: Tensor, topk: int, eps: float, group):
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        b, here = u.shape[0], u
        cosine, at, near = u.new_empty((b, 0)), None, u[:, None, :][:, :0]  # (b, <= K, ...) so far
        for step in range(ranks):
            owner = (rank - step) % ranks
            k = min(topk, b - (owner == rank))
            if k > 0:
                offset = 0 if owner == rank else b  # where u's own rows are among these keys
                found = KOLEO_LOSS.forward_op(u, here, offset, k, eps, False)[1]  # (b, k)
                rows = here[found]  # (b, k, D)
                found = found + owner * b
                at = found if at is None else torch.cat([at, found], 1)
                near = torch.cat([near, rows], 1)
                cosine = torch.cat([cosine, (u[:, None, :] * rows).sum(2)], 1)
                order = at.argsort(dim=1)  # the lowest place first among equals
                first = cosine.gather(1, order).argsort(dim=1, descending=True, stable=True)
                order = order.gather(1, first)[:, :topk]
                cosine, at = cosine.gather(1, order), at.gather(1, order)
                near = near.gather(1, order[:, :, None].expand(-1, -1, u.shape[1]))
            if step + 1 < ranks:
                here = _pass_on(here, group)
        ctx.call = eps, group
        if at is None:  # no other row
            ctx.save_for_backward(u)
            return u.sum(1) * 0
        gap = u[:, None, :] - near + eps
        ctx.save_for_backward(u, at, gap)
        return gap_loss(gap, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        eps, group = ctx.call
        u, *found = ctx.saved_tensors
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        b, mine = u.shape[0], torch.zeros_like(u)
        there = torch.zeros_like(u)  # what comes to the rows of one rank: travels, and comes home
        if found:
            at, gap = found
            pull = gap_pull(grad, gap, eps)
            mine = pull.sum(1)
        for step in range(ranks):
            owner = (rank - step) % ranks
            if found:
                low = owner * b
                inside = (at >= low) & (at < low + b)
                share = torch.where(inside[:, :, None], -pull, 0).flatten(0, 1)
                place = torch.where(inside, at - low, 0).reshape(-1)
                # index_put adds in the order of the indices, sorted: without atomics on CUDA.
                there = there.index_put((place,), share, accumulate=True)
            there = _pass_on(there, group)
        return mine + there, None, None, None


def ring_neighbours(u: Tensor, topk: int, eps: float, group) -> Tensor:
    """KoLeo losses (B,) of the local rows u, which `ring_size` has found to be equally many."""
    return _RingNeighbours.apply(u.contiguous(), topk, eps, group)
