"""bench/models: the runs end to end, small."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def attacks_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("bench.models.robust_attacks")
    monkeypatch.setattr(module, "DRAWS", 1)
    monkeypatch.setattr(module, "NOISE_D", 2000)
    return module


def test_error_under_attack(attacks_run, tmp_path, capsys):
    """Every rule and attack once. What the specification measured: an outlier of length 100 enters
    the paper-form output as it enters the mean; the geometric median keeps it out."""
    file = tmp_path / "results.json"
    attacks_run.main(["--rows", "noise", "--byzantine", "3", "--json", str(file)])
    rows = [entry["extra_info"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert len(rows) == 2 * len(attacks_run.rules(3)) * len(attacks_run.ATTACKS)
    error = {(row["line"], row["column"]): row["value"] for row in rows if row["shows"] == "error"}
    cosine = {(row["line"], row["column"]): row["value"] for row in rows if row["shows"] != "error"}
    assert error["mean", "none"] == pytest.approx(0, abs=1e-6)
    assert error["trimmed mean", "none"] < 0.2
    assert error["mean", "N(0;100²)"] == pytest.approx(100 * math.sqrt(3) / 15, rel=0.1)
    assert error["flag, paper", "N(0;100²)"] == pytest.approx(error["mean", "N(0;100²)"], rel=0.05)
    assert error["geometric median", "N(0;100²)"] < 0.2
    assert error["flag, paper", "1e6"] > 1e5
    assert all(cosine["flag, official", attack] > 0.9 for attack in attacks_run.ATTACKS)
    printed = capsys.readouterr().out
    assert "### robust_attacks rows=noise f=3 shows=error" in printed
    assert "| geometric median | 0.0" in printed


def test_gradients_of_a_real_model(attacks_run):
    (rows,) = attacks_run.digits(skewed=True)
    assert rows.shape == (15, 17_226)
    assert rows.isfinite().all()
    (same,) = attacks_run.digits(skewed=True)
    assert (rows == same).all()
    assert (rows.norm(dim=1) > 0).all()


@pytest.mark.timeout(150)
def test_a_byzantine_rank(tmp_path):
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench.models.byzantine_rank", "--steps", "2"]
    command += ["--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=140)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [entry["extra_info"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert {row["line"] for row in rows} > {"DDP (mean)", "flag, rescaled", "median"}
    assert all(0 <= row["value"] <= 1 for row in rows)
    assert "### byzantine_rank" in done.stdout


@pytest.fixture
def color_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("bench.models.color_transfer")
    monkeypatch.setattr(module, "COLORS", 12)
    monkeypatch.setattr(module, "FITTED", 500)
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


@pytest.mark.peers
def test_colors_of_two_photographs(color_run, tmp_path, capsys):
    """As good as POT at every k; fewer nonzeros for smaller k; the colours are the target's."""
    file, picture = tmp_path / "results.json", tmp_path / "colors.png"
    color_run.main(["--k", "1", "3", "12", "--json", str(file), "--picture", str(picture)])
    rows = [entry["extra_info"] for entry in json.loads(file.read_text())["benchmarks"]]
    found = {(row["shows"], row["line"], row["k"]): row["value"] for row in rows}
    assert len(found) == len(rows) == 4 * len(color_run.contenders()) * 3
    for k in (1, 3, 12):
        assert found["value", "dashpot, auto", k] >= found["value", "POT", k] - 1e-9
        assert found["nonzeros", "dashpot, auto", k] <= 12 * k
    assert found["nonzeros", "dashpot, auto", 1] == 12
    assert found["row-error", "dashpot, auto", 12] < 1e-4
    assert picture.stat().st_size > 10_000
    assert "| dashpot, auto |" in capsys.readouterr().out

    source, target = (color_run.palette(name, 12) for name in ("china.jpg", "flower.jpg"))
    assert source.labels.shape == target.labels.shape == (427, 640)
    assert source.masses.sum().item() == pytest.approx(1)
    plan = source.masses[:, None] * target.masses  # every colour becomes the target's mean colour
    got = color_run.recolored(source, target, plan)
    assert (got - target.masses @ target.colors).abs().max().item() < 1e-12


@pytest.mark.peers
def test_solves_reach_pots_value(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("bench.models.ot_solvers")
    file = tmp_path / "results.json"
    module.main(["--small", "--threads", "1", "--json", str(file)])
    rows = [entry["extra_info"] for entry in json.loads(file.read_text())["benchmarks"]]
    found = {(row["line"], row["column"]): row["value"] for row in rows}
    for k in (2, 8):
        title = f"64 x 64, k = {k}"
        assert found[title, "dashpot, value"] >= found[title, "POT, value"]
        assert found[title, "steps"] <= 500
    assert "| 64 x 64, k = 8 |" in capsys.readouterr().out


def test_stochastic_experts_beside_switch(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT)
    module = importlib.import_module("bench.models.stochastic_experts")
    file = tmp_path / "results.json"
    module.main(["--seeds", "2", "--steps", "2", "--json", str(file)])
    rows = [entry["extra_info"] for entry in json.loads(file.read_text())["benchmarks"]]
    assert {row["line"] for row in rows} == set(module.CONTENDERS)
    found = {(row["line"], row["column"]): row for row in rows}
    accuracy = found["stochastic", "test accuracy, %"]
    assert 0 < accuracy["value"] < 100 and accuracy["error"] >= 0 and "±" in accuracy["cell"]
    assert found["switch", "accuracy minus Switch's"]["value"] == 0
    assert all(row["section"] == ["seeds=2", "steps=2"] for row in rows)
    assert "### stochastic_experts seeds=2 steps=2" in capsys.readouterr().out
