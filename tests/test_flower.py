"""dashpot.flower: the strategy on records made here, and in a simulation of real clients."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import dashpot
import numpy
import pytest
import torch

pytestmark = pytest.mark.peers  # flwr


def strategy(*args, **options):
    from dashpot.flower import RobustStrategy

    made = RobustStrategy(*args, **options)
    made._arrays = arrays({"weight": torch.ones(2, 3), "count": torch.tensor([5, 5])})
    return made


def arrays(state):
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({name: Array(value.numpy()) for name, value in state.items()})


def reply(state, examples=10, node=0, **metrics):
    """A client's message: what of it the strategy reads. Flower makes them within a run only."""
    from flwr.app import MetricRecord, RecordDict

    numbers = {} if examples is None else {"num-examples": examples}
    content = RecordDict({"arrays": arrays(state), "metrics": MetricRecord({**numbers, **metrics})})
    metadata = types.SimpleNamespace(src_node_id=node)
    return types.SimpleNamespace(content=content, metadata=metadata, has_error=lambda: False)


def state(move, count=7, shape=(2, 3), dtype=torch.float32):
    return {"weight": torch.ones(shape, dtype=dtype) + move, "count": torch.tensor([count, 5])}


def test_moves_the_model_by_the_rule_s_update():
    """On differences: by hand the same as the rule on what clients changed."""
    moves = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    replies = [
        reply(state(move, count)) for move, count in zip(moves, (7, 8, 9, 7, 1), strict=True)
    ]
    for rule, options in (("flag", {"output": "rescaled"}), ("krum", {"f": 1})):
        new, metrics = strategy(rule, rule_options=options).aggregate_train(1, replies)
        want = 1 + dashpot.robust_aggregate((1 + moves) - 1, rule, **options)
        torch.testing.assert_close(torch.tensor(new["weight"].numpy()), want)
        assert new["weight"].dtype == "float32"
        assert new["count"].numpy().tolist() == [7, 5]  # the lower median
        assert new["count"].dtype == "int64"
        assert dict(metrics) == {}


def test_weights_count_examples_where_the_rule_has_weights():
    moves = torch.tensor([0.0, 1.0, 5.0])
    replies = [
        reply(state(move), examples) for move, examples in zip(moves, (1, 1, 6), strict=True)
    ]
    new, _ = strategy("mean", weighted=True).aggregate_train(1, replies)
    assert new["weight"].numpy()[0, 0] == pytest.approx(1 + (0 + 1 + 6 * 5) / 8)
    new, _ = strategy("mean").aggregate_train(1, replies)
    assert new["weight"].numpy()[0, 0] == pytest.approx(1 + 2)
    with pytest.raises(ValueError, match="weighted: expected a rule with weights"):
        strategy("krum", rule_options={"f": 0}, weighted=True)


def test_a_rule_made_before():
    made = strategy(dashpot.RobustAggregator("mean"), weighted=True)
    assert made.aggregate_train(1, [reply(state(2.0))])[0]["weight"].numpy()[0, 0] == 3
    with pytest.raises(TypeError, match="rule: expected a name, or a RobustAggregator without"):
        strategy(dashpot.RobustAggregator("mean"), rule_options={"f": 1})


def test_nan_goes_to_the_rule():
    replies = [reply(state(move)) for move in (0.0, 1.0, 2.0, math.nan)]
    new, _ = strategy("mean").aggregate_train(1, replies)
    assert new["weight"].numpy()[0, 0] == pytest.approx(2.0)


def test_a_round_without_a_finite_update_keeps_the_model():
    replies = [reply(state(math.nan)), reply(state(math.inf))]
    assert strategy("mean").aggregate_train(1, replies)[0] is None
    assert strategy("mean").aggregate_train(1, []) == (None, None)


@pytest.mark.parametrize(
    ("bad", "options", "reason"),
    [
        (state(0.0, shape=(2, 2)), {}, "weight: expected"),
        (state(0.0, dtype=torch.float64), {}, "weight: expected"),
        ({"weight": torch.ones(2, 3)}, {}, "expected the arrays"),
        (state(0.0), {"examples": None}, "expected one MetricRecord with 'num-examples'"),
        (state(0.0), {"loss": 1.0}, "differ in kind"),
    ],
)
def test_a_malformed_reply_is_left_out(monkeypatch, bad, options, reason):
    """Clients cannot end the run; who was left out, and why, is in the log."""
    said = []
    made = strategy("krum", rule_options={"f": 1})  # five are the fewest for f = 1
    module = importlib.import_module("dashpot.flower")
    monkeypatch.setattr(module, "log", lambda level, text, *values: said.append(text % values))
    good = [reply(state(0.5 + 0.01 * i), node=i) for i in range(5)]
    new, _ = made.aggregate_train(1, [reply(bad, node=99, **options), *good])
    assert 1.49 < new["weight"].numpy()[0, 0] < 1.55
    assert len(said) == 1
    assert "left out node" in said[0]
    assert reason in said[0]
    with pytest.raises(ValueError, match="f: expected"):
        made.aggregate_train(2, good[:3])


def test_metrics_are_averaged_as_flower_does():
    replies = [reply(state(0.0), 10, loss=1.0), reply(state(1.0), 30, loss=2.0)]
    _, metrics = strategy("mean").aggregate_train(1, replies)
    assert dict(metrics) == {"loss": pytest.approx(1.75)}


def test_without_flower_the_error_says_what_to_install(monkeypatch):
    """dashpot itself does not import it."""
    code = "import sys, dashpot; assert 'flwr' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "dashpot.flower", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs flwr.*pip install 'dashpot\[flower\]'"):
        importlib.import_module("dashpot.flower")


@pytest.mark.timeout(180)
def test_a_federation_with_a_byzantine_client_learns(tmp_path):
    """FedAvg does not, with the same client in it. In a process of its own: ray stays nowhere."""
    path = Path(__file__).with_name("flower_run.py")
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=170, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert results.pop("FedAvg")["accuracy"] < 0.3
    assert set(results) == {"flag", "geometric_median"}
    for result in results.values():
        assert result["accuracy"] > 0.85
        assert result["kind"] == "float32"
        assert result["counter"] == [7]
    assert "left out node" in done.stderr  # the reply of the wrong shape, in each run
    assert done.stderr.count("left out node") == len(results)


def test_arrays_of_any_kind():
    """float64 and float16 weights keep their dtype, flags take the majority."""
    made = strategy("mean")
    start = {"half": torch.zeros(2, dtype=torch.float16), "flag": torch.tensor([False, True])}
    made._arrays = arrays(start)
    replies = [
        reply({"half": torch.full((2,), value, dtype=torch.float16),
               "flag": torch.tensor([value > 1, value > 2])}) for value in (1.0, 2.0, 3.0)
    ]  # fmt: skip
    new, _ = made.aggregate_train(1, replies)
    assert new["half"].dtype == "float16"
    assert numpy.allclose(new["half"].numpy(), 2.0)
    assert new["flag"].numpy().tolist() == [True, False]
    assert new["flag"].dtype == "bool"
