"""route_balanced: equal counts, the same routes on every backend."""

from __future__ import annotations

import dashpot
import pytest
import torch


def test_vector(backend):
    got = dashpot.route_balanced(10, 4, seed=1234, device=backend.device)
    assert got.tolist() == [2, 1, 2, 2, 3, 0, 1, 3, 0, 0]


@pytest.mark.parametrize(("seed", "offset"), [(-7, 3), (2**64 - 3, -5), (2**40 + 1, 2**33 + 7)])
@pytest.mark.parametrize(("units", "experts"), [
    (1, 1), (3, 8),
    (33, 1 << 16),  # CUDA: two buckets; more experts than anybody has
    (1501, 7),
    (70_001, 64),  # CUDA: more buckets than the scan's block has threads
])  # fmt: skip
def test_same_bits_as_the_reference_and_balanced(backend, units, experts, seed, offset):
    got = dashpot.route_balanced(units, experts, seed=seed, offset=offset, device=backend.device)
    with dashpot.backend("reference"):
        want = dashpot.route_balanced(units, experts, seed=seed, offset=offset)
    assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)
    counts = want.bincount(minlength=experts)
    assert counts.max() - counts.min() <= 1


def test_no_unit(backend):
    assert dashpot.route_balanced(0, 4, seed=1, device=backend.device).shape == (0,)


def test_seed_offset_and_tensors(backend):
    def draw(seed, offset):
        return dashpot.route_balanced(50, 5, seed=seed, offset=offset, device=backend.device)

    base = draw(1, 2)
    tensors = [torch.tensor(v, device=backend.device) for v in (1, 2)]
    assert torch.equal(draw(*tensors), base)
    assert not torch.equal(draw(2, 2), base) and not torch.equal(draw(1, 3), base)


def test_each_unit_meets_each_expert_equally_often(backend):
    draws = torch.stack(
        [dashpot.route_balanced(6, 3, seed=s, device=backend.device).cpu() for s in range(600)]
    )
    for unit in range(6):
        counts = draws[:, unit].bincount(minlength=3)
        assert ((counts - 200).square() / 200).sum() < 14


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [((-1, 2), ValueError, "num_units: expected 0 <="), ((3, 0), ValueError, "num_experts: expec"),
     ((3, "2"), TypeError, "num_experts: expected an int, got str")],
)  # fmt: skip
def test_errors(args, error, message):
    with pytest.raises(error, match=message):
        dashpot.route_balanced(*args, seed=0)
