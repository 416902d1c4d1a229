"""What measures, and what reports: dashpot._measure, bench/conftest.py and bench/report.py."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dashpot import REGISTRY, _measure
from dashpot._backends import BACKENDS
from dashpot._measure import Peer

from bench import peers

ROOT = Path(__file__).resolve().parents[1]
COMBINE = REGISTRY["combine"]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Rotated inputs and copies of 1 MiB, and no backend that only the tests have."""
    monkeypatch.setattr(_measure, "cache_bytes", lambda device: 1 << 18)
    for name in set(BACKENDS) - {"cpp", "triton", "cuda"}:
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.syspath_prepend(ROOT)  # bench/ is used from the repository's root


@pytest.fixture
def report():
    return importlib.import_module("bench.report")


@pytest.fixture
def small_case():
    return _measure.case(COMBINE, (3, 1000), torch.float32, "cpu")


def product(grads, coeffs, p):
    return coeffs.to(grads[0].dtype) @ grads[0]  # (p,) @ (p, d) -> (d,)


PRODUCT = Peer(product)


# --------------------------------------------------------------------------------------------
# _measure


def test_measure(small_case):
    row, seen = _measure.measure(small_case, "c @ X", peer=PRODUCT, seconds=0.005, threads=1)
    assert (row.op, row.contender, row.kind, row.size) == ("combine", "c @ X", "peer", [3, 1000])
    assert row.rounds == len(seen) >= _measure.MIN_ROUNDS
    assert min(seen) <= row.p20 <= row.median <= row.p80 <= max(seen)
    assert (row.bytes, row.flops) == COMBINE.floor(*small_case.args)
    assert row.floor == row.bytes / row.bandwidth
    assert row.share == row.floor / row.median
    assert 0 < row.error < row.error_limit


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        (lambda *args: 1.05 * product(*args), r"error 5.00e-02, limit 1.00e-02"),
        (lambda *args: product(*args)[:-1], r"expected \(1000,\), got \(999,\)"),
        (lambda *args: product(*args).fill_(torch.nan), "error inf"),
        (lambda *args: None, "returned no tensor"),
    ],
    ids=["wrong", "short", "NaN", "nothing"],
)
def test_a_wrong_peer_is_refused(small_case, peer, message):
    with pytest.raises(_measure.RefusedError, match=message):
        _measure.measure(small_case, "a peer", peer=Peer(peer))


def test_forward_and_backward():
    case = _measure.case(COMBINE, (3, 1000), torch.float32, "cpu", gradient=(0,))
    case.bound = lambda grads, coeffs, p: (4 * grads[0].numel(), 7)
    for name, peer in (("reference", None), ("c @ X", PRODUCT)):
        row, _ = _measure.measure(case, name, peer=peer, seconds=0.005, threads=1)
        assert row.passes == "forward + backward"
        assert (row.bytes, row.flops) == (12000, 7)
        assert row.peak_memory >= 4 * 4000  # the update and the gradient
    outputs, grads = case.step(product)(*case.args)
    assert [x.shape for x in (*outputs, *grads)] == [(1000,), (3, 1000)]


def test_a_wrong_gradient_is_refused():
    case = _measure.case(COMBINE, (3, 1000), torch.float32, "cpu", gradient=(0,))

    def steeper(grads, *rest):
        return product([grads[0] + 0.1 * (grads[0] - grads[0].detach())], *rest)

    with pytest.raises(_measure.RefusedError, match=r"error 1.00e-01, limit 1.00e-02"):
        _measure.measure(case, "a peer", peer=Peer(steeper))


def test_a_yardstick_is_timed_as_it_is(small_case):
    half = Peer(lambda grads, coeffs, p: grads[0][0] * 2, checked=False)
    row, seen = _measure.measure(small_case, "half", peer=half, seconds=0.005, threads=1)
    assert (row.kind, row.error, row.error_limit) == ("yardstick", None, None)
    assert row.median > 0 and len(seen) >= _measure.MIN_ROUNDS


def test_contenders_meet_the_same_moments(small_case):
    """Each in turn, stretch by stretch; one that is wrong or fails spoils no other."""
    calls = []

    def broken(*args):
        raise ModuleNotFoundError("no such library")

    def named(name, factor=1.0):
        def peer(*args):
            calls.append(name)
            return factor * product(*args)

        return Peer(peer)

    small_case.expected  # noqa: B018 - the truth, before calls are counted
    contenders = {"first": named("first"), "wrong": named("wrong", 1.1), "second": named("second")}
    contenders["broken"] = Peer(broken)
    found = _measure.measure_together(small_case, contenders, seconds=0.02, threads=1)
    assert isinstance(found["wrong"], _measure.RefusedError)
    assert isinstance(found["broken"], ModuleNotFoundError)
    assert found["first"][0].contender == "first"
    assert len(found["second"][1]) >= _measure.MIN_ROUNDS
    assert calls.count("wrong") == 1  # the check
    turns = [name for name, _ in itertools.groupby(calls)]
    assert turns.count("first") >= _measure.STRETCHES <= turns.count("second")


def test_an_op_in_place_leaves_the_checked_inputs_alone(small_case):
    def overwritten(grads, coeffs, p):
        result = product(grads, coeffs, p)
        grads[0].mul_(2)
        return result

    before = small_case.args[0][0].clone()
    inputs = _measure.rotated(small_case.args, "cpu")
    peer = Peer(overwritten, checked=False)
    _measure.measure(small_case, "a peer", peer=peer, seconds=0.005, threads=1, inputs=inputs)
    assert torch.equal(small_case.args[0][0], before)
    assert not torch.equal(inputs[0][0][0], before)


def test_a_wrong_backend_is_refused(small_case, monkeypatch):
    small_case.expected  # noqa: B018 - the truth, before it is broken
    right = COMBINE.reference
    monkeypatch.setattr(COMBINE, "reference", lambda *args: [1.001 * x for x in right(*args)])
    with pytest.raises(_measure.RefusedError, match=r"combine by reference .* limit"):
        _measure.measure(small_case, "reference")


def test_zeros_are_refused(small_case):
    small_case.args[1].zero_()
    with pytest.raises(_measure.RefusedError, match="every expected value is 0"):
        _measure.measure(small_case, "reference")


def test_inputs_rotate_beyond_the_cache(small_case):
    copies = _measure.rotated(small_case.args, "cpu")
    size = small_case.args[0][0].nbytes + small_case.args[1].nbytes
    assert len(copies) * size >= 4 * _measure.cache_bytes("cpu") or len(copies) == _measure._COPIES
    assert len({copy[0][0].data_ptr() for copy in copies}) == len(copies)
    seen = []
    _measure.times(lambda x: seen.append(x), [(i,) for i in range(3)], 1e-4, "cpu")
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_slow_calls_get_few_rounds():
    calls = []
    ticks = iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_measure.time, "perf_counter", lambda: float(next(ticks)))
        seen = _measure.times(lambda x: calls.append(x), [(0,)], 0.1, "cpu")
    assert seen == [1.0] * _measure.MIN_ROUNDS
    assert len(calls) == _measure.MIN_ROUNDS + 1


def test_the_copy_moves_as_much_as_the_floor():
    copy = _measure.CopyLoop("cpu")
    assert copy.source.nbytes >= 4 * _measure.cache_bytes("cpu")
    copy.start(10**9)
    assert copy.bytes == 2 * copy.source.nbytes  # as much as there is
    copy.start(0)
    assert copy.bytes == copy.LEAST  # read and written
    copy.target.zero_()
    copy.run()
    assert int(copy.target.sum()) == copy.LEAST // 8
    copy.samples += [1.0, 2.0, 4.0]
    assert copy.bandwidth == copy.LEAST / 2.0


def test_peak_memory():
    def function(x):
        y = x + 1.0  # 4 MB
        z = y * 2.0  # 8 MB at this time
        del y
        return z + 1.0  # 8 MB again

    x = torch.ones(1_000_000)
    peak = _measure.peak_memory(function, (x,), "cpu")
    assert 8_000_000 <= peak < 8_000_100


def test_percentiles():
    assert _measure._percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    assert _measure._percentiles([3.0]) == (3.0, 3.0, 3.0)


# --------------------------------------------------------------------------------------------
# bench files


def bench_module(name: str):
    return importlib.import_module(f"bench.{name}")


FILES = sorted(f"{p.parent.name}.{p.stem}" for p in (ROOT / "bench").glob("*/bench_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_peers_compute_the_same(name):
    """On the least of the inputs that are timed; errors and limits are verify's."""
    module = bench_module(name)
    dtype, sizes = next(iter(module.SIZES.items()))
    size = min(sizes, key=lambda one: math.prod(n for n in one if isinstance(n, int) and n > 0))
    for options in getattr(module, "OPTIONS", [{}]):
        gradient = getattr(module, "GRADIENT", ())
        row = _measure.case(REGISTRY[module.OP], size, dtype, "cpu", gradient, **options)
        for peer_name, peer in peers.installed(getattr(module, "PEERS", {})).items():
            if peer.checked and peer.when(size, row.dtype, "cpu", options):
                verdict = _measure.verify(row, peer_name, peer.function, is_peer=True)
                assert verdict.ok and verdict.error < 1, peer_name


def test_options_change_the_result():
    """The peers of lam = 1 are not those of lam = 0."""
    module = bench_module("aggregate.bench_flag_aggregate")
    row = _measure.case(REGISTRY["flag_aggregate"], (7, 3000), torch.float32, "cpu")
    for peer in module.PEERS.values():
        plain, pairs = (peer.function(*row.args, lam=lam) for lam in (0.0, 64.0))
        assert not torch.allclose(plain, pairs, rtol=1e-4)


def test_the_clock_replays():
    clock = bench_module("conftest").Clock()
    target = clock.replay([0.5, 2.0])
    shown = []
    for _ in range(2):
        before = clock()
        target()
        shown.append(clock() - before)
    assert shown == [0.5, 2.0]


def test_a_run_from_end_to_end(tmp_path, report):
    file = tmp_path / "results.json"
    command = [sys.executable, "-m", "pytest", "bench/aggregate/bench_combine.py", "-q", "--quick",
               "--time", "0.01", "--threads", "1,2", "-k", "15x1e5", "-p", "no:cacheprovider",
               f"--benchmark-json={file}"]  # fmt: skip
    # Else pytest-benchmark takes the run for a worker of the run around it.
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = report.read([str(file)])
    names = {row["contender"] for row in rows}
    assert names >= {"reference", "c @ X", "(c * X).sum(0)"}
    if torch.cuda.is_available():
        assert {row["device"] for row in rows} == {"cuda"}
    else:
        assert len(rows) == 2 * len(names)
        assert {row["threads"] for row in rows} == {1, 2}
    for row, entry in zip(rows, json.loads(file.read_text())["benchmarks"], strict=True):
        assert row["median"] == pytest.approx(entry["stats"]["median"], rel=1e-6)
        assert row["torch"] == torch.__version__
    assert "15x1e5" in report.tables(rows)


# --------------------------------------------------------------------------------------------
# report


def row_of(op="flag_aggregate", contender="cpp", kind="backend", median=1e-3, **changes) -> dict:
    row = {
        "op": op, "contender": contender, "kind": kind, "size": [15, 1_000_000],
        "dtype": "float32", "options": {"lam": 0.0}, "device": "cpu", "device_name": "a CPU",
        "threads": 1, "median": median, "p20": 0.9 * median, "p80": 1.1 * median,
        "bytes": 124_000_000, "floor": 8e-4, "share": 8e-4 / median, "peak_memory": 4_000_000,
        "torch": "2.13.0",
    }  # fmt: skip
    return {**row, **changes}


ROWS = [
    row_of(),
    row_of(contender="reference", median=4e-3),
    row_of(contender="official svd", kind="peer", median=0.25),
    row_of(threads=2, median=5e-4),
    row_of(contender="reference", threads=2, median=3e-3),
    row_of(op="combine", options={}),
]


@pytest.fixture
def results(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"benchmarks": [{"extra_info": row} for row in ROWS]}))
    return file


def test_table(report):
    assert report.table(ROWS[:5]).splitlines() == [
        "| size | dtype | lam | threads | backend | dashpot | of floor | vs reference "
        "| vs official svd |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 15x1e6 | float32 | 0 | 1 | cpp | 1 ms | 80% | 4x | 250x |",
        "| 15x1e6 | float32 | 0 | 2 | cpp | 500 us | 160% | 6x |  |",
    ]


def test_table_of_forward_and_backward_tells_the_memory(report):
    both = {"passes": "forward + backward", "options": {"kind": "power"}}
    rows = [
        row_of(peak_memory=12_345_678, **both),
        row_of(contender="products", kind="yardstick", median=5e-4, peak_memory=1000, **both),
    ]
    assert report.table(rows).splitlines()[::2] == [
        "| size | dtype | kind | threads | backend | dashpot | of floor | memory | vs products |",
        "| 15x1e6 | float32 | power | 1 | cpp | 1 ms | 80% | 12.3 MB | 0.5x (0.001 MB) |",
    ]
    assert "### flag_aggregate, forward + backward\n" in report.tables(rows)


def test_table_names_the_device_where_there_are_several(report):
    table = report.table([row_of(), row_of(device_name="a GPU", device="cuda", median=1e-4)])
    assert "| a CPU | 15x1e6" in table and "| a GPU | 15x1e6" in table


def test_table_of_the_reference_alone(report):
    table = report.table([row_of(contender="reference"), ROWS[2]])
    assert "| 15x1e6 | float32 | 0 | 1 | reference | 1 ms | 80% | 250x |" in table


def test_dispatch_table(report):
    row = {"op": "dispatch", "way": "Op.__call__", "mode": "no_grad", "direct_us": 1.5,
           "call_us": 2.75, "added_us": 1.25, "budget_us": 2.0}  # fmt: skip
    line = report.table([row]).splitlines()[-1]
    assert line == "| Op.__call__ | no | 1.50 us | 2.75 us | 1.25 us | 2 us |"


def test_table_of_ready_cells(report):
    """bench/models: a line and a column for each; several rows for one place are an error."""
    rows = [
        {"op": "model", "corner": "rule", "line": line, "column": column, "cell": f"{line}{column}",
         "shows": shows, "section": [f"shows={shows}"], "options": {}, "device_name": "a CPU",
         "torch": "2.13.0"}
        for shows in ("error", "cosine") for line in "ab" for column in "xy"
    ]  # fmt: skip
    assert report.table(rows[:3]).splitlines() == [
        "| rule | x | y |", "| --- | --- | --- |", "| a | ax | ay |", "| b | bx |  |",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected one row per line and column, got several"):
        report.table(rows)
    assert "### model shows=error\n\na CPU" in report.tables(rows)
    text = report.update("<!-- bench:model shows=cosine column=y -->\n<!-- /bench -->", rows)
    assert "| b | by |" in text and "bx" not in text


def test_update(report):
    text = (
        "before\n<!-- bench:flag_aggregate threads=2 -->\nold\n<!-- /bench -->\nbetween\n"
        "<!-- bench:combine -->\n<!-- /bench -->\nafter\n"
    )
    new = report.update(text, ROWS)
    assert "old" not in new and "1 ms | 80%" in new.split("between")[1]
    assert "500 us" in new.split("between")[0] and "250x" not in new
    assert [new.startswith("before\n"), new.endswith("<!-- /bench -->\nafter\n")] == [True] * 2
    assert report.update(new, ROWS) == new


def test_the_table_of_ops_is_that_of_the_sources(report):
    readme = (ROOT / "README.md").read_text()
    assert report.update_ops(readme) == readme, "python -m bench.report RESULTS --update README.md"
    families = set(report.OPS.findall(readme))
    assert {name for _, name, _ in families} == {op.family for op in REGISTRY.values()}
    row = next(line for line in readme.splitlines() if line.startswith("| `combine` |"))
    assert row.endswith("| yes | yes | yes | yes |")
    with pytest.raises(ValueError, match="ops:nothing"):
        report.ops_table("nothing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "expected a <!-- bench:NAME -->"),
        ("<!-- bench:gram -->\n<!-- /bench -->", "bench:gram: expected at least one row"),
        ("<!-- bench:combine threads=7 -->\n<!-- /bench -->", "expected at least one row"),
        ("<!-- bench:combine size=15x1e6 thread=1 -->\n<!-- /bench -->", "got 'thread'"),
    ],
)
def test_update_refuses(report, text, message):
    with pytest.raises(ValueError, match=message):
        report.update(text, ROWS)


def test_report_on_the_command_line(results, tmp_path):
    readme, plots = tmp_path / "README.md", tmp_path / "plots"
    readme.write_text("<!-- bench:combine -->\n<!-- /bench -->\n")
    command = [sys.executable, "-m", "bench.report", str(results), "--table",
               "--plots", str(plots), "--update", str(readme)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "### flag_aggregate\n\na CPU, torch 2.13.0\n\n| size" in done.stdout
    assert "| 15x1e6 | float32 | 1 | cpp | 1 ms | 80% |" in readme.read_text()
    (plot,) = plots.iterdir()
    assert plot.name == "aggregate_cpu.svg"
    assert all(text in plot.read_text() for text in ("flag_aggregate", "floor", "reference"))


def test_report_refuses_a_file_without_rows(report, tmp_path, capsys):
    file = tmp_path / "empty.json"
    file.write_text('{"benchmarks": []}')
    with pytest.raises(SystemExit) as stop:
        report.main([str(file)])
    assert stop.value.code == 2
    assert "got none" in capsys.readouterr().err
