"""two_pass_loss: both passes as one doubled batch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from dashpot.experts import StochasticExperts, consistency_loss, convert, two_pass_loss
from torch import nn

D, H, E, V = 6, 10, 4, 5
DOUBLE = {"dtype": torch.float64}
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Model(nn.Module):
    """Embedding, experts, logits; with words (B, S) or (S, B)."""

    def __init__(self, **options):
        super().__init__()
        self.words = nn.Embedding(V, D, **DOUBLE)
        self.experts = StochasticExperts(D, H, E, offset=0, **options, **DOUBLE)
        self.out = nn.Linear(D, V, **DOUBLE)

    def forward(self, words, scale=1.0, **call):
        return self.out(self.experts(self.words(words), **call)) * scale


def data(*shape):
    target = torch.randint(V, shape)
    target.view(-1)[0] = -100
    return torch.randint(V, shape), target


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("level", ["token", "sequence", "batch"])
@pytest.mark.parametrize("distinct", [False, True])
def test_is_two_calls_and_the_loss(batch_dim, level, distinct):
    model = Model(level=level, batch_dim=batch_dim, distinct_passes=distinct)
    words, target = data(4, 6)
    options = {"alpha": 5.0, "label_smoothing": 0.1}
    first, second = (model(words, pass_id=p) for p in range(2))
    want = consistency_loss(first, second, target, **options)
    model.experts.num_passes = 2
    got = two_pass_loss(model, words, target, batch_dim=batch_dim, **options)
    torch.testing.assert_close(list(got), [want, first, second], **EXACT)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got.loss, parameters), torch.autograd.grad(want, parameters), **EXACT
    )
    assert level == "batch" or (first - second).abs().max() > 1e-3


def test_forms_of_inputs_and_outputs():
    model = Model()
    words, target = data(4, 6)
    want = two_pass_loss(model, words, target).loss
    assert torch.equal(two_pass_loss(model, (words, 1.0), target).loss, want)
    assert torch.equal(two_pass_loss(model, {"words": words, "scale": 1.0}, target).loss, want)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, words):
            return SimpleNamespace(logits=self.model(words))

    assert torch.equal(two_pass_loss(Wrapped(), words, target).loss, want)
    with pytest.raises(TypeError, match="expected it to return logits, got tuple"):
        two_pass_loss(lambda_module(lambda words: (words,)), words, target)


def lambda_module(function):
    module = nn.Module()
    module.forward = function
    return module


@pytest.mark.parametrize("options", [{"level": "batch"}, {"distinct_passes": True}], ids=str)
def test_layers_must_know_of_the_doubling(options):
    """Or both passes would be one: a consistency loss of nothing."""
    model = Model(**options)
    words, target = data(4, 6)
    with pytest.raises(ValueError, match="model: expected experts with num_passes=2"):
        two_pass_loss(model, words, target)
    two_pass_loss(model.eval(), words, target)
    assert two_pass_loss(Model(num_passes=2, **options), words, target).loss.requires_grad


def test_a_step_of_a_converted_model_makes_passes_agree():
    """Minimising the loss brings the two passes' outputs together."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(V, 8), nn.TransformerEncoderLayer(8, 2, H, dropout=0.0, batch_first=True),
        nn.Linear(8, V),
    )  # fmt: skip
    convert(model, E, layers="all", level="batch", num_passes=2, distinct_passes=True, noise=0.5)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    words, target = data(8, 6)
    gaps = []
    for _ in range(60):
        optimizer.zero_grad()
        loss, first, second = two_pass_loss(model, words, target, alpha=50.0)
        loss.backward()
        optimizer.step()
        gaps.append((first.softmax(-1) - second.softmax(-1)).abs().sum(-1).mean().item())
    assert 0 < sum(gaps[-10:]) < 0.5 * sum(gaps[:10])


def test_the_comparison_on_digits_runs(capsys, tmp_path):
    """bench/models/stochastic_experts.py, a few steps of it: every contender, and repeatable."""
    from bench.models import stochastic_experts

    files = [tmp_path / name for name in ("first", "second")]
    for file in files:
        options = ["--seeds", "1", "--steps", "2", "--json", str(file)]
        stochastic_experts.main(options)
    results = [json.loads(file.read_text())["benchmarks"] for file in files]
    assert results[0] == results[1]
    rows = [entry["extra_info"] for entry in results[0]]
    assert {row["line"] for row in rows} == set(stochastic_experts.CONTENDERS)
    accuracy = [row["value"] for row in rows if row["column"] == "test accuracy, %"]
    assert len(accuracy) == len(stochastic_experts.CONTENDERS)
    assert all(0 < value < 100 for value in accuracy)
    printed = capsys.readouterr().out
    assert "### stochastic_experts seeds=1 steps=2" in printed
    assert all(f"| {name} |" in printed for name in stochastic_experts.CONTENDERS)
