"""One rank of test_info_nce.py's group: python ranks.py RANK RANKS FILE.

Every loss over a group of 4 ranks, and over the group of the first 2, against the same loss in one
process: the mean of the ranks' losses, and gradients divided by the number of ranks.
"""

from __future__ import annotations

import sys

import dashpot
import torch
import torch.distributed as dist

B, D = 6, 10  # rows of a rank


def batch(seed: int, ranks: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(ranks * B, D, generator=generator, dtype=torch.float64)
    second = first + torch.randn(ranks * B, D, generator=generator, dtype=torch.float64)
    return [first, second]


def losses(ids, scale):
    """{name: (function(z1, z2, scale, ids, **group), group form only?)}"""

    def info(z1, z2, ids, **group):
        return dashpot.info_nce(z1, z2, logit_scale=scale, **group)

    def both(z1, z2, ids, **group):
        return dashpot.info_nce(z1, z2, temperature=0.1, symmetric=True, **group)

    def ring(z1, z2, ids, **group):
        loss = dashpot.ring_info_nce if group else dashpot.info_nce
        return loss(z1, z2, logit_scale=scale, **group)

    def ring_both(z1, z2, ids, **group):
        loss = dashpot.ring_info_nce if group else dashpot.info_nce
        return loss(z1, z2, temperature=0.01, symmetric=True, **group)

    def nt_xent(z1, z2, ids, **group):
        return dashpot.nt_xent(z1, z2, temperature=0.2, **group)

    def subjects(z1, z2, ids, **group):
        return dashpot.nt_xent(
            z1, z2, temperature=0.2, subject_ids=ids, mask_cross_view=True, **group
        )

    def ring_nt_xent(z1, z2, ids, **group):
        loss = dashpot.ring_nt_xent if group else dashpot.nt_xent
        return loss(z1, z2, temperature=0.01, **group)

    def ring_subjects(z1, z2, ids, **group):
        loss = dashpot.ring_nt_xent if group else dashpot.nt_xent
        return loss(z1, z2, temperature=0.2, subject_ids=ids, mask_cross_view=True, **group)

    def ring_across(z1, z2, ids, **group):
        loss = dashpot.ring_nt_xent if group else dashpot.nt_xent
        return loss(z1, z2, temperature=0.2, subject_ids=ids, within_view=False, **group)

    def koleo(z1, z2, ids, **group):
        return dashpot.koleo_loss(z1, topk=2, **group) + 0 * z2.sum()

    def ring_koleo(z1, z2, ids, **group):
        """Neighbours at home and elsewhere, more than a rank has; equal rows on two ranks."""
        loss = dashpot.ring_koleo_loss if group else dashpot.koleo_loss
        last = torch.arange(len(z1)) % B == B - 1  # of each rank
        twice = torch.where(last[:, None], 1.0, z1)
        return loss(z1, topk=B + 2, **group) + loss(twice, **group) + 0 * z2.sum()

    return [info, both, ring, ring_both, nt_xent, subjects, ring_nt_xent, ring_subjects,
            ring_across, koleo, ring_koleo]  # fmt: skip


def check(group, rank: int, ranks: int) -> None:
    whole = batch(ranks, ranks)
    ids = torch.arange(ranks * B) % (2 * B + 1)
    mine = slice(rank * B, rank * B + B)
    scale = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    for loss in losses(ids, scale):
        full = [z.clone().requires_grad_() for z in whole]
        want = loss(*full, ids)
        want_grads = torch.autograd.grad(want, [*full, scale], allow_unused=True)
        local = [z[mine].clone().requires_grad_() for z in whole]
        got = loss(*local, ids[mine], group=group)
        grads = torch.autograd.grad(got, [*local, scale], allow_unused=True)
        total = got.detach().clone()
        dist.all_reduce(total, group=group)
        torch.testing.assert_close(total / ranks, want.detach(), msg=loss.__name__)
        for grad, right in zip(grads[:2], want_grads[:2], strict=True):
            torch.testing.assert_close(grad / ranks, right[mine], msg=loss.__name__)
        assert (grads[2] is None) == (want_grads[2] is None)
        if grads[2] is not None:
            dist.all_reduce(grads[2], group=group)
            torch.testing.assert_close(grads[2] / ranks, want_grads[2], msg=loss.__name__)


def main(rank: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=ranks)
    pair = dist.new_group([0, 1])
    check(dist.group.WORLD, rank, ranks)
    if rank < 2:
        check(pair, rank, 2)
    dist.barrier()
    uneven = torch.ones(2 + (rank == 1), D)
    try:
        dashpot.info_nce(uneven, uneven, group=dist.group.WORLD)
    except ValueError as error:
        assert "between 2 and 3" in str(error), error
    else:
        raise AssertionError("unequal ranks were taken")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
