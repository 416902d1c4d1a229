"""bench/gpu.py: what goes wrong in a step is reported and does not stop the later ones."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from dashpot.__main__ import _parser
from dashpot._dispatch import REGISTRY

ROOT = Path(__file__).resolve().parents[1]


def _load():
    spec = importlib.util.spec_from_file_location("dashpot_gpu_check", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu = _load()


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def step(name: str, code: str, seconds: float = 20.0, needs: str | None = None, **options):
    return gpu.Step(name, python(code), seconds, needs=needs, **options)


def run(steps, tmp_path, limit=120.0) -> tuple[dict[str, dict], dict]:
    """({step: entry}, report as written)"""
    returned = gpu.run_steps(steps, tmp_path / "out", limit)
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert written == returned
    return {entry["name"]: entry for entry in written["steps"]}, written


def test_a_failure_is_reported_and_the_later_steps_run(tmp_path, capfd):
    entries, _ = run(
        [
            step("bad", "print('first words'); print('last words'); raise SystemExit(3)"),
            gpu.Step("absent", ["no-such-command-of-dashpot"], 5.0, needs=None),
            step("good", "import sys; print('fine'); print('aside', file=sys.stderr)"),
        ],
        tmp_path,
    )
    assert list(entries) == ["bad", "absent", "good"]
    assert (entries["bad"]["outcome"], entries["bad"]["returncode"]) == ("failed", 3)
    assert entries["bad"]["tail"] == "first words\nlast words\n"
    assert (entries["absent"]["outcome"], entries["absent"]["returncode"]) == ("failed", None)
    assert "no-such-command-of-dashpot" in entries["absent"]["tail"]
    assert (entries["good"]["outcome"], entries["good"]["returncode"]) == ("ok", 0)
    assert "-c" in entries["good"]["command"]

    printed = capfd.readouterr().out
    assert printed == (tmp_path / "out" / "gpu.log").read_text()
    for words in ("last words", "fine", "aside"):
        assert words in printed
    summary = printed[printed.rindex("step  ") :]
    assert "failed (exit status 3)" in summary
    assert summary.splitlines()[-1].split()[::2] == ["good", "ok"]


def test_no_folder_of_the_machine_is_told(tmp_path):
    code = f"print({str(ROOT / 'bench')!r}); print({sys.prefix!r} + '/lib')"
    entries, _ = run([step("talker", code)], tmp_path)
    log = (tmp_path / "out" / "gpu.log").read_text()
    for text in (log, json.dumps(entries)):
        assert "./bench" in text and "PYTHON/lib" in text
        assert str(ROOT) not in text and sys.prefix not in text


def test_a_step_beyond_its_limit_is_ended_with_all_it_started(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    hang = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-S', '-c', {child!r}])\n"
        "print('started', flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    # 1.5 s for "hang" and nothing to spare: the limit is the sum of the steps' own.
    entries, _ = run([step("hang", hang, 1.5), step("after", "print('on')", 10.0)], tmp_path, 11.5)
    assert entries["hang"]["outcome"] == "timed out"
    assert entries["hang"]["tail"] == "started\n"
    assert 1.4 < entries["hang"]["seconds"] < 20
    assert entries["after"]["outcome"] == "ok"
    time.sleep(max(0.0, start + 6 - time.monotonic()))
    assert not mark.exists()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_step_beyond_its_limit_may_save_what_it_has(tmp_path, handler):
    """Also in a shell's background job, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, handler)
    saved = tmp_path / "work" / "rows.json"
    code = (
        "import time\n"
        "try:\n"
        "    print('running', flush=True); time.sleep(60)\n"
        f"except KeyboardInterrupt:\n    open({str(saved)!r}, 'w').write('[1, 2]')\n"
    )
    steps = [step("slow", code, 8.0, results={"rows": saved})]
    entries, report = run(steps, tmp_path, 8.0)
    assert entries["slow"]["outcome"] == "timed out"
    assert report["rows"] == [1, 2]


def test_steps_that_need_the_build_wait_for_a_good_one(tmp_path):
    steps = [step("build", "raise SystemExit(1)"), step("use", "", needs="build"), step("own", "")]
    entries, _ = run(steps, tmp_path)
    assert entries["use"]["outcome"] == "not run: build failed"
    assert entries["use"]["returncode"] is None
    assert entries["own"]["outcome"] == "ok"
    entries, _ = run([step("build", ""), steps[1]], tmp_path)
    assert entries["use"]["outcome"] == "ok"
    entries, _ = run(steps[1:], tmp_path)  # the build was left out: an earlier one serves
    assert entries["use"]["outcome"] == "ok"


def test_time_that_is_over_is_said(tmp_path):
    hang = "import time; time.sleep(60)"
    entries, _ = run([step("a", hang, 1.0), step("b", "", 1e-6)], tmp_path, 1.0)
    assert [entry["outcome"] for entry in entries.values()] == [
        "timed out",
        "not run: no time left",
    ]


def test_time_left_over_goes_to_the_later_steps(tmp_path):
    entries, _ = run(
        [step("quick", "", 10.0), step("long", "import time; time.sleep(2)", 0.5)], tmp_path, 10.5
    )
    assert entries["long"]["outcome"] == "ok"


def test_steps_of_a_group_run_at_the_same_time(tmp_path):
    """Each waits for a file that the other writes; a failure of one is its own."""
    files = [tmp_path / name for name in "ab"]
    meet = (
        "import pathlib, time\npathlib.Path({0!r}).touch()\n"
        "while not pathlib.Path({1!r}).exists(): time.sleep(0.02)\nprint('met'); {2}"
    )
    steps = [
        step("one", meet.format(*map(str, files), "raise SystemExit(4)"), group="g"),
        step("two", meet.format(*map(str, files[::-1]), ""), group="g", needs="one"),
        step("last", "", needs="two"),
    ]
    entries, _ = run(steps, tmp_path)
    assert [entry["outcome"] for entry in entries.values()] == ["failed", "ok", "ok"]
    assert entries["one"]["tail"] == entries["two"]["tail"] == "met\n"
    log = (tmp_path / "out" / "gpu.log").read_text().splitlines()
    assert {"one       | met", "two       | met"} <= set(log)


def test_a_group_has_the_longest_limit_and_what_hangs_is_cut(tmp_path):
    hang = "import time; print('on', flush=True); time.sleep(60)"
    steps = [
        step("hang", hang, 0.5, group="g"),
        step("slow", "import time; time.sleep(2)", 4.0, group="g"),
        step("after", "", 10.0),
    ]
    start = time.monotonic()
    entries, _ = run(steps, tmp_path, 14.0)
    assert [entry["outcome"] for entry in entries.values()] == ["timed out", "ok", "ok"]
    assert entries["hang"]["tail"].startswith("on\n")
    assert time.monotonic() - start < 30


def test_an_interrupt_leaves_nothing_running(tmp_path, monkeypatch):
    marks = [tmp_path / name for name in "ab"]
    code = "import time; time.sleep(4); open({0!r}, 'w')"
    steps = [step(mark.name, code.format(str(mark)), group="g") for mark in marks]

    def interrupted(self, timeout=None):
        time.sleep(0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpu.run_steps(steps, tmp_path / "out", 60.0)
    time.sleep(max(0.0, start + 5 - time.monotonic()))
    assert not any(mark.exists() for mark in marks)


def test_the_tests_that_run_are_those_on_the_device():
    """As names are made in tests/conftest.py; here there may be no GPU to collect them for."""
    names = {
        "test_every_op.py::test_forward[gram-cuda-cuda-float32-3x17]": True,
        "test_every_op.py::test_forward[gram-triton-cuda-bfloat16-3x17]": True,
        "test_every_op.py::test_forward[gram-reference-cuda-float32-3x17]": False,
        "test_every_op.py::test_forward[gram-cpp-cpu-float32-3x17]": False,
        "test_every_op.py::test_forward[gram-emulator-cpu-float32-3x17]": False,
        "test_cli.py::test_info": True,
        "test_cuda_compile.py::test_resources[experts/dispatch_plan.cu-90]": False,
    }
    found = re.sub(r"[\w-]+", lambda word: word[0] if word[0] in ("and", "or", "not")
                   else f"({word[0]!r} in name)", gpu.ON_DEVICE)  # fmt: skip
    for name, runs in names.items():
        assert eval(found, {"name": name}) == runs, name


def test_results_are_taken_into_the_report(tmp_path):
    facts, rows, torn = (tmp_path / name for name in ("facts.json", "rows.json", "torn.json"))
    torn.write_text("[1]")  # of an earlier run: must not be taken for this one's
    bench = {
        "machine_info": {"gpu": "some"},
        "benchmarks": [{"name": "gram", "stats": {"median": 0.5, "data": [0.5, 0.5]}}],
    }

    def write(file, text):
        return f"open({str(file)!r}, 'w').write({text!r})"

    entries, report = run(
        [
            step("facts", write(facts, '{"name": "a GPU"}'), results={"device": facts}),
            step("rows", write(rows, json.dumps(bench)), results={"bench": rows}),
            step("torn", write(torn, '{"a": '), results={"torn": torn}),
            step("silent", "", results={"silent": tmp_path / "silent.json"}),
        ],
        tmp_path,
    )
    assert report["device"] == {"name": "a GPU"}
    assert report["benchmarks"] == [{"name": "gram", "stats": {"median": 0.5}}]
    assert report["machine_info"] == {"gpu": "some"}
    assert [entry["outcome"] for entry in entries.values()] == ["ok", "ok", "failed", "failed"]
    assert "torn.json is not JSON" in entries["torn"]["tail"]
    assert "silent.json was not written" in entries["silent"]["tail"]
    assert "torn" not in report


def test_the_exit_status_is_that_of_the_whole(tmp_path, monkeypatch):
    for code, status in (("", 0), ("raise SystemExit(2)", 1)):
        steps = [step("one", code), step("two", "")]
        monkeypatch.setattr(gpu, "all_steps", lambda native, steps=steps: steps)
        assert gpu.main([str(tmp_path / "out")]) == status
    assert gpu.main([str(tmp_path / "out"), "--steps", "two"]) == 0
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [entry["name"] for entry in report["steps"]] == ["two"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "build,nonsense"], "--steps: expected some of device, build, .*'nonsense'"),
        (["--limit", "0"], "--limit: expected a number of seconds > 0, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        gpu.main([str(tmp_path), *arguments])
    assert exit_info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_real_steps_fit_their_limit_and_name_what_is_there():
    steps = gpu.all_steps(native=True)
    groups = gpu.grouped(steps)
    assert sum(map(gpu.longest, groups)) + gpu.GRACE <= gpu.LIMIT
    assert gpu.LIMIT + 2 * gpu.GRACE < 600  # one call of ten minutes
    (together,) = [group for group in groups if len(group) > 1]
    assert {one.name for one in together} == {"check", "tests", "memcheck", "racecheck"}
    assert [one.name for one in steps[-2:]] == ["dispatch", "bench"]  # timed, so alone
    names = [one.name for one in steps]
    assert len(set(names)) == len(names)
    assert all(one.needs in (None, *names[:i]) for i, one in enumerate(steps))
    assert (ROOT / gpu.DISPATCH).is_file()
    build = next(one for one in steps if one.name == "build")
    assert "native" in build.environment["CMAKE_ARGS"]
    build = next(one for one in gpu.all_steps(native=False) if one.name == "build")
    assert "native" not in build.environment["CMAKE_ARGS"]


def test_the_command_line_knows_what_the_steps_ask_for():
    for one in gpu.all_steps(native=True):
        words = one.command
        if "dashpot" in words:
            options = _parser().parse_args(words[words.index("dashpot") + 1 :])
            assert options.command in ("info", "check")


def test_the_sanitized_ops_have_cuda_kernels_and_the_filter_matches_them():
    files = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".cu", ".cuh")]
    sources = {file.name: file.read_text() for file in files}
    ops = set(gpu.cuda_ops())
    assert {"gram", "combine", "flag_coeffs"} <= ops <= set(REGISTRY)
    kernels = {name: text for name, text in sources.items() if "__global__" in text}
    assert kernels
    for name, text in kernels.items():
        # compute-sanitizer looks at the kernels whose mangled name holds "dashpot".
        assert "namespace dashpot" in text, name


def test_the_machine_is_described_also_without_a_gpu(tmp_path, capsys):
    import torch

    file = tmp_path / "device.json"
    status = gpu.main([str(file), "--describe"])
    facts = json.loads(file.read_text())
    assert status == (0 if torch.cuda.is_available() else 1)
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert ("torch sees no CUDA device" in capsys.readouterr().out) == bool(status)
