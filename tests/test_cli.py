"""python -m dashpot: each command in this process, and once with nothing but torch installed."""

import json
import subprocess
import sys

import pytest
import torch
from dashpot import REGISTRY, __main__, _check, _measure, _terminal
from dashpot._backends import BACKENDS, Kernel

COMBINE = REGISTRY["combine"]


@pytest.fixture(autouse=True)
def user_backends(monkeypatch):
    """The backends that a user has: without those that the tests add, and with a small cache."""
    for name in set(BACKENDS) - {"cpp", "triton", "cuda"}:
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setattr(_measure, "cache_bytes", lambda device: 1 << 18)


@pytest.fixture
def replaced(monkeypatch):
    """replaced(op, forward): the op's cpp kernel is `forward`; other backends it has not."""

    def replace(op, forward):
        kernel = Kernel("cpp", forward, None, None, ("cpu",), frozenset(_check._DTYPES))
        reference = op.kernel("reference")
        kernels = {"cpp": kernel, "reference": reference}
        monkeypatch.setattr(op, "kernel", lambda name: kernels.get(name, "not built: a test"))
        monkeypatch.setitem(op._kernels, "cpu", (kernel,))

    return replace


@pytest.fixture
def tiny(monkeypatch):
    """One small size to time."""
    monkeypatch.setitem(COMBINE.sizes, "bench", [(3, 1000), (5, 2000)])


def run(capsys, *argv: str) -> tuple[int, str]:
    code = __main__.main(argv)
    return code, capsys.readouterr().out


# --------------------------------------------------------------------------------------------
# info


def test_info(capsys):
    code, out = run(capsys, "info")
    assert code == 0
    assert f"torch                         {torch.__version__}" in out
    for name, op in REGISTRY.items():
        (line,) = [line for line in out.splitlines() if line.split(" ")[0] == name]
        assert line.endswith("yes")  # the reference
        if not hasattr(op, "ops") and op.kernel("cpp").__class__ is str:
            assert op.kernel("cpp") in line


def test_info_gives_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(COMBINE, "kernel", lambda name: "not built: for this test")
    assert "not built: for this test" in run(capsys, "info")[1]


# --------------------------------------------------------------------------------------------
# check


def test_check(capsys, tmp_path):
    file = tmp_path / "check.json"
    code, out = run(
        capsys, "check", "combine", "flag_coeffs", "--device", "cpu", "--json", str(file)
    )
    assert code == 0, out
    rows = json.loads(file.read_text())["rows"]
    assert all(row["ok"] for row in rows)
    found = {(row["op"], row["dtype"]) for row in rows if row["backend"] == "reference"}
    floats = ("float64", "float32", "bfloat16", "float16")
    assert found == {("combine", name) for name in floats} | {("flag_coeffs", "float64")}
    assert {len(row["sizes"]) for row in rows if row["op"] == "combine"} == {
        len(COMBINE.sizes["test"])
    }


def wrong(change):
    """combine's reference with its first segment changed."""

    def forward(grads, coeffs, p):
        first, *others = COMBINE.reference(grads, coeffs, p)
        return [change(first), *others]

    return forward


WRONG = {
    "a twentieth too large": lambda out: out * 1.05,
    "one element": lambda out: torch.cat((out[:-1], out[-1:] + 0.5)) if len(out) else out,
    "zeros": torch.zeros_like,
    "NaN": lambda out: torch.full_like(out, torch.nan),
    "shape": lambda out: out[None],
    "dtype": lambda out: out.to(torch.float64 if out.dtype != torch.float64 else torch.float32),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_check_fails_on_a_wrong_kernel(capsys, replaced, change):
    replaced(COMBINE, wrong(change))
    code, out = run(capsys, "check", "combine", "--device", "cpu")
    assert code == 1
    lines = [line for line in out.splitlines() if line.startswith("combine")]
    assert {("FAILED" in line) == (" cpp " in line) for line in lines} == {True}


def test_check_shows_what_a_kernel_raises(capsys, replaced):
    def forward(grads, coeffs, p):
        raise RuntimeError("misaligned address")

    replaced(COMBINE, forward)
    code, out = run(capsys, "check", "combine", "--device", "cpu")
    assert code == 1
    assert "RuntimeError: misaligned address" in out


def test_check_refuses_inputs_that_test_nothing(capsys, monkeypatch):
    inputs = COMBINE.inputs

    def zeros(size, dtype, device, seed):
        grads, coeffs, p = inputs(size, dtype, device, seed)
        return [torch.zeros_like(g) for g in grads], torch.zeros_like(coeffs), p

    monkeypatch.setattr(COMBINE, "inputs", zeros)
    code, out = run(capsys, "check", "combine", "--device", "cpu")
    assert code == 1
    assert "most test sizes expect zeros only" in out


def test_compare_refuses_a_truth_that_is_not_finite(monkeypatch):
    args = COMBINE.inputs((3, 17), torch.float32, "cpu", 0)
    reference = COMBINE.reference
    monkeypatch.setattr(COMBINE, "reference", lambda *a: [x / 0 for x in reference(*a)])
    verdict = _check.compare(COMBINE, "reference", args)
    assert not verdict.ok
    assert "not finite though the inputs are" in str(verdict)


def test_compare_sees_a_wrong_gradient(replaced, monkeypatch):
    args = COMBINE.inputs((3, 17), torch.float32, "cpu", 0)
    replaced(COMBINE, COMBINE.reference)
    assert _check.compare(COMBINE, "cpp", args).ok
    expected = _check.expect(COMBINE, args)  # before the formula is broken
    backward = COMBINE.reference_backward

    def broken(*values):
        grad_grads, grad_coeffs = backward(*values)
        return grad_grads, 1.01 * grad_coeffs

    monkeypatch.setattr(COMBINE, "reference_backward", broken)
    verdict = _check.compare(COMBINE, "cpp", args, expected=expected)
    assert not verdict.ok
    assert verdict.part == "gradient 1"


@pytest.mark.parametrize(
    ("got", "truth", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0, torch.nan, torch.inf], [0.0, torch.nan, torch.inf], 0.0),
        ([1.0, torch.nan], [1.0, 2.0], torch.inf),
        ([1.0, 2.0], [1.0, torch.nan], torch.inf),
        ([torch.inf], [-torch.inf], torch.inf),
        ([0.25], [0.0], 0.25),
        ([], [], 0.0),
    ],
)
def test_error(got, truth, error):
    assert _check.error_of(torch.tensor(got), torch.tensor(truth)) == error


def test_error_of_integers_is_exact():
    assert _check.error_of(torch.tensor([3]), torch.tensor([3])) == 0.0
    assert _check.error_of(torch.tensor([3]), torch.tensor([4])) == torch.inf


def test_compare_values():
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    good, bad = truth.float() * (1 + 2e-7), truth.float() * (1 + 2e-6)
    assert _check.compare_values(good, truth.float(), truth, torch.float32).ok
    assert not _check.compare_values(bad, truth.float(), truth, torch.float32).ok
    # Four times eager PyTorch's own error is granted.
    assert _check.compare_values(bad, truth.float() * (1 + 1e-6), truth, torch.float32).ok


def test_a_chain_mixes_backends_where_one_lacks_an_op(replaced, monkeypatch):
    chain = REGISTRY["flag_aggregate"]
    gram, coeffs, combine = chain.ops
    replaced(gram, gram.reference)
    replaced(combine, combine.reference)
    reference = coeffs.kernel("reference")
    monkeypatch.setattr(
        coeffs, "kernel", lambda name: reference if name == "reference" else "not built: a test"
    )
    monkeypatch.setitem(coeffs._kernels, "cpu", ())
    args = chain.inputs((5, 64), torch.float32, "cpu", 0)
    assert _check.contenders(chain, args) == ["cpp,reference", "reference"]
    assert _check.reasons(chain, args)["cpp"] == "flag_coeffs: not built: a test"
    assert _check.compare(chain, "cpp,reference", args).ok


# --------------------------------------------------------------------------------------------
# bench


def bench(capsys, file, *argv: str) -> tuple[int, str, dict]:
    code, out = run(capsys, "bench", "combine", "--device", "cpu", "--time", "0.01",
                    "--json", str(file), *argv)  # fmt: skip
    return code, out, json.loads(file.read_text())


def test_bench(capsys, tmp_path, tiny):
    plot, before = tmp_path / "plot.svg", torch.get_num_threads()
    code, out, result = bench(capsys, tmp_path / "b.json", "--plot", str(plot), "--threads", "1")
    assert code == 0
    assert torch.get_num_threads() == before
    assert {tuple(row["size"]) for row in result["rows"]} == {(3, 1000), (5, 2000)}
    for row in result["rows"]:
        assert row["threads"] == 1 and row["rounds"] >= _measure.MIN_ROUNDS
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert row["share"] == pytest.approx(row["bytes"] / row["bandwidth"] / row["median"])
        assert row["peak_memory"] >= 4 * row["size"][1]  # the output at least
    assert result["environment"]["torch"] == torch.__version__
    assert "3x1000" in out and "1.00x" in out
    assert "reference" in plot.read_text()


def test_bench_counts_operations_on_request(capsys, tmp_path, tiny):
    result = bench(capsys, tmp_path / "b.json", "--peak-gflops", "1e-6")[2]
    assert result["rows"]
    assert all(row["floor"] == pytest.approx(row["flops"] / 1e3) for row in result["rows"])


def test_bench_against_compiled(capsys, tmp_path, tiny, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    result = bench(capsys, tmp_path / "b.json", "--compile")[2]
    assert compiled == [COMBINE.reference] * 2
    assert sum(row["contender"] == "torch.compile" for row in result["rows"]) == 2


def test_bench_refuses_a_wrong_kernel(capsys, tmp_path, tiny, replaced):
    replaced(COMBINE, wrong(lambda out: out * 1.001))
    code, out, result = bench(capsys, tmp_path / "b.json")
    assert code == 1
    assert {row["contender"] for row in result["rows"]} == {"reference"}
    assert len(result["refused"]) == 2 and "refused: combine by cpp" in out


def test_interrupted_bench_keeps_its_rows(capsys, tmp_path, tiny, monkeypatch):
    measure, calls = _measure.measure, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(_measure, "measure", interrupted)
    code, out, result = bench(capsys, tmp_path / "b.json")
    assert code == 130
    assert len(result["rows"]) == 1 and "Interrupted" in out and "3x1000" in out


def test_interrupted_check_keeps_its_rows(capsys, tmp_path, monkeypatch):
    check, calls = _check._check_one, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        check(*args)

    monkeypatch.setattr(_check, "_check_one", interrupted)
    file = tmp_path / "c.json"
    code, out = run(capsys, "check", "combine", "--device", "cpu", "--json", str(file))
    assert code == 130 and "Interrupted" in out
    rows = json.loads(file.read_text())["rows"]
    assert rows and {len(row["sizes"]) for row in rows} == {2}


# --------------------------------------------------------------------------------------------
# Terminal


def test_table_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _terminal.table(("op", "why"), [("gram", "not [built]")], "a title")
    out = capsys.readouterr().out
    assert "a title" in out and "┃" in out and "not [built]" in out


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with _terminal.progress(2, "checking") as step:
        step("gram [1]")
        step("combine")
    assert "checking" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------
# Arguments, and a bare installation


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["bench", "gramm"], "expected one of "),
        (["check", "gramm"], "expected one of "),
        (["bench", "--time", "0"], "expected a number > 0, got 0"),
        (["bench", "--threads", "-1"], "expected a number > 0, got -1"),
        (["bench", "--threads", "two"], "invalid int value: 'two'"),
        (["bench", "--plot", "x.txt"], "expected a file .svg, .png or .pdf, got 'x.txt'"),
        (["bench", "--dtype", "int8"], "invalid choice"),
    ],
)
def test_bad_arguments(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        __main__.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_is_forwarded(monkeypatch):
    calls = []
    module = type(sys)("dashpot._demo")
    module.run = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "dashpot._demo", module)
    monkeypatch.setattr(sys.modules["dashpot"], "_demo", module, raising=False)
    assert __main__.main(["demo", "--output", "x.png", "--quick"]) == 0
    assert calls == [{"output": "x.png", "quick": True}]


BARE = """
import sys
for name in ("rich", "matplotlib", "triton", "dashpot._C"):
    sys.modules[name] = None  # as if it were not installed
from dashpot import REGISTRY, __main__, _measure
_measure.cache_bytes = lambda device: 1 << 18
REGISTRY["combine"].sizes["bench"] = [(3, 1000)]
assert __main__.main(["info"]) == 0
assert __main__.main(["check", "combine", "--device", "cpu"]) == 0
assert __main__.main(["bench", "combine", "--device", "cpu", "--time", "0.01"]) == 0
try:
    __main__.main(["bench", "--plot", "x.svg"])
except SystemExit as stop:
    sys.exit(stop.code)
"""


def test_with_nothing_but_torch():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "needs matplotlib" in done.stderr
    assert "no: the PyTorch reference serves every op" in done.stdout
    assert "not built: " in done.stdout
    assert "4 of 4 agree with the float64 reference" in done.stdout
    assert "3x1000" in done.stdout
