"""robust_all_reduce, by seven ranks."""

from __future__ import annotations

import copy

import dashpot
import pytest
import torch
import torch.distributed as dist
from common import ATTACKS, FINITE, attacked, check, close, honest_rows, rules, same_on_all_ranks
from dashpot import Bucketing
from dashpot.distributed import RobustState, robust_all_reduce


@check("all_reduce")
def every_rule_under_every_attack(rank, p):
    """1,001 numbers over 7 ranks are 143 each; 1,000 leave the last rank fewer."""
    for i, (rule, options) in enumerate(rules(p)):
        for attack in ATTACKS if rule != "mean" else FINITE:
            rows = attacked(p, 1001 - i % 2, attack)
            update = robust_all_reduce(rows[rank], rule, **options)
            want = dashpot.robust_aggregate(rows, rule, **options)
            assert want.isfinite().all(), (rule, attack)
            close(update, want)
            same_on_all_ranks(update)


@check("all_reduce")
def ties_stay_ties(rank, p):
    """Bulyan's last choices are between rows that are each other's nearest. What the ranks add must
    stay symmetric to the last bit; some draws, since not every one rounds so."""
    for seed in range(6):
        rows = attacked(p, 1000, "sign flip", seed)
        update = robust_all_reduce(rows[rank], "bulyan", f=1)
        close(update, dashpot.robust_aggregate(rows, "bulyan", f=1))
    statistic = torch.rand(p, p, dtype=torch.float64)
    statistic = statistic + statistic.mT  # drawn by each rank for itself
    dashpot.distributed._add_over_ranks(statistic, None)
    assert torch.equal(statistic, statistic.mT)
    same_on_all_ranks(statistic)


@check("all_reduce")
def lengths_that_do_not_divide(rank, p):
    """Fewer numbers than ranks: some have nothing to do."""
    for d in (0, 1, 6, 7, 8, 100):
        rows = honest_rows(p, d)
        for rule, options in (("flag", {}), ("coordinate_median", {})):
            update = robust_all_reduce(rows[rank], rule, **options)
            close(update, dashpot.robust_aggregate(rows, rule, **options))


@check("all_reduce")
def dtypes(rank, p):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = attacked(p, 515, "scaled").to(dtype)
        for rule, options in (("flag", {"output": "rescaled"}), ("coordinate_median", {})):
            update = robust_all_reduce(rows[rank], rule, **options)
            assert update.dtype == dtype
            want = dashpot.robust_aggregate(rows, rule, **options)
            close(update, want, max(1e-5, 2 * torch.finfo(dtype).eps))
            same_on_all_ranks(update)


@check("all_reduce")
def lists_of_mixed_dtypes(rank, p):
    """One solution for all of them; not contiguous ones too; what was given stays as it is."""
    shapes = ((3, 5), (), (0, 4), (11,))
    columns = [
        honest_rows(p, 3 * 5, 1).view(p, 5, 3).mT, honest_rows(p, 1, 2)[:, 0],
        torch.zeros(p, 0, 4, dtype=torch.float64), honest_rows(p, 11, 3).float(),
    ]  # fmt: skip
    rows = [[column[i] for column in columns] for i in range(p)]
    before = copy.deepcopy(rows[rank])
    for rule, options in (("flag", {}), ("trimmed_mean", {"f": 2})):
        update = robust_all_reduce(rows[rank], rule, **options)
        want = dashpot.robust_aggregate(rows, rule, **options)
        assert [tuple(t.shape) for t in update] == list(shapes)
        for got, expected, column in zip(update, want, columns, strict=True):
            assert got.dtype == column.dtype
            close(got, expected, 1e-5)  # products of float32 rows are summed in float32
    assert all(torch.equal(a, b) for a, b in zip(rows[rank], before, strict=True))


@check("all_reduce")
def a_centre(rank, p):
    """Cut as the rows are."""
    rows, centers = honest_rows(p, 101), honest_rows(1, 101, 5)
    options = {"tau": 2.0, "n_iter": 2, "center": centers[0]}
    update = robust_all_reduce(rows[rank], "centered_clipping", **options)
    close(update, dashpot.robust_aggregate(rows, "centered_clipping", **options))
    listed = [list(row.split([40, 61])) for row in rows]
    options["center"] = list(centers[0].split([40, 61]))
    parts = robust_all_reduce(listed[rank], "centered_clipping", **options)
    close(torch.cat(parts), update)
    with pytest.raises(ValueError, match="center: expected the shapes"):
        robust_all_reduce(rows[rank, :50], "centered_clipping", tau=2.0, center=centers[0])
    with pytest.raises(ValueError, match="center: expected None"):
        RobustState("centered_clipping", tau=2.0, center=centers[0])


@check("all_reduce")
def the_same_buckets_on_every_rank(rank, p):
    """A random stage needs a generator; seeded alike, it draws alike."""
    rows = attacked(p, 100, "scaled")
    mine, theirs = (Bucketing(2, torch.Generator().manual_seed(3)) for _ in range(2))
    aggregate = dashpot.RobustAggregator("geometric_median", [mine])
    for _ in range(2):
        update = robust_all_reduce(rows[rank], aggregate)
        close(update, dashpot.robust_aggregate(rows, "geometric_median", pre=[theirs]))
    with pytest.raises(ValueError, match=r"pre\[0\]: expected a generator, seeded alike"):
        robust_all_reduce(rows[rank], "geometric_median", pre=[Bucketing(2)])
    with pytest.raises(TypeError, match="rule: expected a name with options"):
        robust_all_reduce(rows[rank], aggregate, f=1)


@check("all_reduce")
def several_under_way(rank, p):
    rows = [attacked(p, 100 + i, "sign flip", i) for i in range(3)]
    work = [robust_all_reduce(one[rank], "flag", async_op=True) for one in rows]
    for one, all_rows in zip(work, rows, strict=True):
        close(one.wait(), dashpot.robust_aggregate(all_rows, "flag"))
    assert torch.equal(work[0].wait(), work[0].wait())  # a second time: the same


@check("all_reduce")
def part_of_the_ranks(rank, p):
    members = [0, 2, 3, 5, 6]
    group = dist.new_group(members)
    if rank in members:
        rows = attacked(len(members), 99, "scaled")
        update = robust_all_reduce(rows[members.index(rank)], "krum", group, f=1)
        close(update, dashpot.robust_aggregate(rows, "krum", f=1))
        same_on_all_ranks(update, group)
    else:
        with pytest.raises(ValueError, match="group: expected one that this rank belongs to"):
            robust_all_reduce(torch.ones(3), "flag", group)


@check("all_reduce")
def bytes_are_those_of_a_ring_all_reduce(rank, p):
    """Counted where the engine is called: what leaves this rank."""
    d, sent = 7 * 1000, []
    real = dist.all_to_all_single, dist.all_reduce, dashpot.distributed._all_gather

    def all_to_all(out, flat, *sizes, **options):
        sent.append(flat.numel() * flat.element_size() * (p - 1) // p)
        return real[0](out, flat, *sizes, **options)

    def all_reduce(tensor, **options):
        sent.append(2 * tensor.numel() * tensor.element_size() * (p - 1) // p)
        return real[1](tensor, **options)

    def all_gather(out, part, **options):
        sent.append(part.numel() * part.element_size() * (p - 1))
        return real[2](out, part, **options)

    dist.all_to_all_single, dist.all_reduce = all_to_all, all_reduce
    dashpot.distributed._all_gather = all_gather
    robust_all_reduce(honest_rows(p, d)[rank].float(), "flag", check=False)
    dist.all_to_all_single, dist.all_reduce, dashpot.distributed._all_gather = real
    ring = 2 * (p - 1) * d * 4 // p
    assert sent == [ring // 2, (p - 1) * 8 * (p + 1), ring // 2], sent


@check("all_reduce")
def ranks_that_differ(rank, p):
    """All of them are told, and the group works on."""
    for flat, rule in (
        (torch.zeros(8 if rank == 2 else 7), "flag"),
        (torch.zeros(7, dtype=torch.float64 if rank == 0 else torch.float32), "flag"),
        (torch.zeros(7), "coordinate_median" if rank == 1 else "flag"),
    ):
        with pytest.raises(ValueError, match=r"the same rule, shapes and dtypes .* rank 3:"):
            robust_all_reduce(flat, rule)
    with pytest.raises(TypeError, match="flat: expected float64"):
        robust_all_reduce(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="flat: expected a tensor or a list"):
        robust_all_reduce([])
    close(robust_all_reduce(torch.ones(3), "coordinate_median"), torch.ones(3))
