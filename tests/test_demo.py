"""`python -m dashpot demo`: the run end to end, and that its comparison is a fair one."""

from __future__ import annotations

import pytest
import torch
from dashpot import _demo
from dashpot.__main__ import main


@pytest.fixture(scope="module")
def data() -> _demo.Digits:
    return _demo.load_digits()


def frozen(rule: _demo.Rule, seen: list) -> _demo.Rule:
    """The rule, run and its input kept; the model stays as it is, whatever the rule returned."""

    def aggregate(grads):
        seen.append([[tensor.clone() for tensor in row] for row in grads])
        return [torch.zeros_like(tensor) for tensor in rule(grads)]

    return aggregate


def inputs_of(rule: _demo.Rule, attack: _demo.Attack | None, data: _demo.Digits) -> torch.Tensor:
    """What a rule is given in three steps of a model that does not move: (steps, p, d)."""
    seen: list = []
    _demo.train(data, frozen(rule, seen), attack, steps=3)
    return torch.stack(
        [torch.stack([torch.cat([t.flatten() for t in row]) for row in grads]) for grads in seen]
    )


def test_quick_run(tmp_path, capsys, monkeypatch):
    result = _demo.compute(quick=True)
    final = {
        attack: {rule: history[-1][1] for rule, history in by_rule.items()}
        for attack, by_rule in result.accuracy.items()
    }
    assert set(final) == set(_demo.QUICK_ATTACKS)
    assert all(0 <= value <= 1 for by_rule in final.values() for value in by_rule.values())
    assert min(final["no attack"]["mean"], final["no attack"]["flag_aggregate"]) > 0.8
    for attack in ("reverse, -10 times own", "NaN"):
        # Chance is 0.1. What lets a Byzantine worker through stays there, as the mean does.
        assert final[attack]["mean"] < 0.2
        assert final[attack]["flag_aggregate"] > 0.65

    assert result.timings.keys() == _demo.TIMED.keys()
    assert all(timing.seconds > 0 for timing in result.timings.values())
    errors = [timing.error for timing in result.timings.values() if timing.error is not None]
    assert len(errors) == 3  # the forms of the Flag Aggregator agree, each with its own rounding
    assert max(errors) < 1e-3

    plot = tmp_path / "plot.png"
    monkeypatch.setattr(_demo, "compute", lambda quick: result)
    assert main(["demo", "--quick", "--output", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000
    printed = capsys.readouterr().out
    last = printed.strip().splitlines()[-1]
    assert str(plot) in last
    assert "dashpot.flag_aggregate(grads" in last
    for by_rule in final.values():
        assert all(f"{value:.3f}" in printed for value in by_rule.values())


@pytest.mark.parametrize("attack", _demo.ATTACKS)
def test_every_rule_gets_the_same_inputs(attack, data):
    want = inputs_of(_demo.mean, _demo.ATTACKS[attack], data)
    assert want.shape[:2] == (3, _demo.WORKERS)
    assert not torch.equal(want[0, 0], want[1, 0])  # another minibatch
    for rule in (_demo.coordinate_median, _demo.flag):
        got = inputs_of(rule, _demo.ATTACKS[attack], data)
        assert torch.equal(got.nan_to_num(nan=-1e9), want.nan_to_num(nan=-1e9))


@pytest.mark.parametrize("attack", [name for name, attack in _demo.ATTACKS.items() if attack])
def test_an_attack_changes_the_byzantine_workers_only(attack, data):
    honest = inputs_of(_demo.mean, None, data)
    attacked = inputs_of(_demo.mean, _demo.ATTACKS[attack], data)
    count = _demo.WORKERS - _demo.BYZANTINE
    assert torch.equal(attacked[:, :count], honest[:, :count])
    for worker in range(count, _demo.WORKERS):
        assert not torch.equal(attacked[:, worker], honest[:, worker])


def test_attacks_send_what_their_definition_says():
    honest = [[torch.tensor([1.0, 4.0])], [torch.tensor([2.0, 0.0])], [torch.tensor([6.0, 2.0])]]
    own = [[torch.tensor([0.5, -1.0])]]
    mean = torch.tensor([3.0, 2.0])
    std = torch.tensor([7.0, 4.0]).sqrt()  # squared deviations 14 and 8 over n - 1 = 2
    generator = torch.Generator().manual_seed(0)

    def sent(attack):
        ((result,),) = _demo.ATTACKS[attack](honest, own, generator)
        return result

    torch.testing.assert_close(sent("sign flip, -mean"), -mean)
    torch.testing.assert_close(sent("ALIE, mean - 0.21 std"), mean - 0.21 * std)
    torch.testing.assert_close(sent("reverse, -10 times own"), torch.tensor([-5.0, 10.0]))
    noise = sent("uniform noise in [0, 1)")
    assert noise.shape == mean.shape
    assert ((noise >= 0) & (noise < 1)).all()
    assert sent("NaN").isnan().all()


def test_the_run_is_reproducible(data):
    first, second = (
        _demo.train(data, _demo.flag, _demo.ATTACKS["uniform noise in [0, 1)"], steps=12)
        for _ in range(2)
    )
    assert [step for step, _ in first] == [10, 12]
    assert first == second


def test_images_are_dealt_out_once_and_none_of_the_held_out(data):
    dealt = torch.cat(data.shards).tolist()
    held_out = data.test.tolist()
    assert len(data.shards) == _demo.WORKERS
    assert min(len(shard) for shard in data.shards) >= _demo.BATCH
    assert sorted(dealt + held_out) == list(range(1797))
    assert len(held_out) == 450
    shares = torch.stack([data.labels[shard].bincount(minlength=10) for shard in data.shards])
    assert (shares == 0).any(1).sum() > _demo.WORKERS // 2  # most workers lack a class


def test_progress_is_told_of_every_step(data):
    told = []
    _demo.train(data, _demo.mean, None, steps=4, advance=lambda: told.append("step"))
    assert len(told) == 4


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install"):
        _demo._require("torch", "no_such_package")
