"""What training runs beside the losses: the momentum encoder, the sampler of pairs."""

from __future__ import annotations

import pytest
import torch
from dashpot.contrastive import EMA, ParticipantPairSampler

# --------------------------------------------------------------------------------------------
# The momentum encoder


def test_ema_module():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    ema = EMA(model, 0.5)
    start = {name: p.detach().float() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[1].num_batches_tracked.fill_(7)
    ema.update(model)
    copy = EMA(model, 0.5)
    copy.load_state_dict(ema.state_dict())
    assert copy.updates.item() == 1
    target = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    copy.copy_to(target)
    now = dict(model.named_parameters())
    for name, p in target.named_parameters():
        torch.testing.assert_close(p.detach(), (start[name] + now[name].detach().float()) / 2)
    assert target[1].num_batches_tracked.item() == 7


def test_ema_ramp():
    ema = EMA(torch.nn.Linear(1, 1), 0.99, final=1.0, steps=400)
    assert ema.momentum_at(0) == 0.99 and ema.momentum_at(400) == ema.momentum_at(500) == 1.0
    assert ema.momentum_at(100) == pytest.approx(0.9914644661, abs=1e-10)


# --------------------------------------------------------------------------------------------
# The sampler


def test_sampler():
    """Two different segments of one participant, every participant once an epoch."""
    ids = torch.tensor([7, 3, 7, 9, 3, 3, 5, 9, 7, 4, 4])  # 5 owns one segment only
    sampler = ParticipantPairSampler(ids, 3, drop_last=False)
    assert len(sampler) == 2
    for _ in range(20):
        batches = list(sampler)
        assert [batch.shape for batch in batches] == [(3, 2), (1, 2)]
        pairs = torch.cat(batches)
        assert bool((ids[pairs[:, 0]] == ids[pairs[:, 1]]).all())
        assert bool((pairs[:, 0] != pairs[:, 1]).all())
        assert sorted(ids[pairs[:, 0]].tolist()) == [3, 4, 7, 9]
    assert len(ParticipantPairSampler(ids, 3)) == len(list(ParticipantPairSampler(ids, 3))) == 1


def test_sampler_draws_uniformly_and_repeats_with_its_generator():
    ids = torch.zeros(4, dtype=torch.int64)
    counts = torch.zeros(4, 4)
    sampler = ParticipantPairSampler(ids, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(2400):
        for pair in sampler:
            counts[pair[0, 0], pair[0, 1]] += 1
    assert counts.diagonal().sum() == 0
    off = counts[~torch.eye(4, dtype=torch.bool)]
    assert off.min() > 140 and off.max() < 260  # 200 each
    one, two = (
        list(ParticipantPairSampler(ids, 1, generator=torch.Generator().manual_seed(5)))
        for _ in range(2)
    )
    assert torch.equal(one[0], two[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([0, 1, 2], 2), "two segments"), (([0.5, 0.5], 2), "integers"), (([0, 0], 0), "batch_size")],
)
def test_sampler_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParticipantPairSampler(*arguments)
