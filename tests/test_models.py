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
