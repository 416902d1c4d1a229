"""The check on a machine with an NVIDIA GPU.

    python3 bench/gpu.py FOLDER        or        make gpu OUT=FOLDER

Builds dashpot for this GPU with what is installed (no network), then runs its checks, its tests
(those of kernels on the GPU; the rest is the CI's), compute-sanitizer over the CUDA kernels, all
these at the same time, and at last the benchmarks, alone. Each step is a process of its own with a
time limit; the later steps run whatever became of the earlier ones. All of it is made to fit into
ten minutes on 16 cores: what a limit cut is "timed out" in the closing table, with what it had
found until then. Into FOLDER go

    gpu.json   machine, versions, every step's outcome, verdicts of `check`, rows of the benchmarks
    gpu.log    all output, as it came

The JSON is written anew after each step, so that what was found survives an interruption. Under
"benchmarks" it holds pytest-benchmark's own rows, without the single timings.

Needs nvcc, and Python >= 3.10 with torch, pybind11, scikit-build-core, cmake, ninja, pytest,
pytest-benchmark, pytest-xdist, pytest-timeout, hypothesis, scikit-learn and matplotlib.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
SITE = WORK / "site"  # where the package is installed: nothing of the system is changed
CUDA = Path("/usr/local/cuda/bin")  # searched after PATH

LIMIT = 570.0  # seconds for all steps
GRACE = 10.0  # from the interrupt, after which pytest still writes what it has, to the kill
TAIL = 60  # lines of each step's output that are kept in the JSON

DISPATCH = "bench/bench_dispatch.py"
# Tests by name: kernels on the device, and the commands, which take the device that is there.
ON_DEVICE = "(-cuda- and not reference-cuda) or test_cli or test_demo"
TOGETHER = "correctness"


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds.

    needs: the step without which this one makes no sense. results: {key in the JSON: file that the
    command writes}. environment: variables beside those of every step. group: neighbours of one
    group run at the same time, all of them for the longest of their limits.
    """

    name: str
    command: list[str]
    seconds: float
    needs: str | None = "build"
    results: dict[str, Path] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    group: str | None = None


def all_steps(native: bool) -> list[Step]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider"]
    cmake_args = "-DDASHPOT_CUDA=ON" + " -DCMAKE_CUDA_ARCHITECTURES=native" * native
    install = [python, "-m", "pip", "install", "--verbose", "--no-index", "--no-deps", "--upgrade"]
    install += ["--no-build-isolation", f"--config-settings=build-dir={WORK / 'cmake'}"]
    workers = max(1, min(10, (os.cpu_count() or 1) - 4))  # one core for each step beside the tests
    return [
        Step("device", [python, __file__, "--describe", str(WORK / "device.json")], 20,
             needs=None, results={"device": WORK / "device.json"}),
        Step("build", [*install, "--target", str(SITE), str(ROOT)], 130,
             needs=None, environment={"CMAKE_ARGS": cmake_args}),
        Step("import", [python, "-c", _IMPORT, str(SITE)], 15),
        Step("info", [python, "-m", "dashpot", "info"], 15),
        Step("check", [python, "-m", "dashpot", "check", "--quick",
                       "--json", str(WORK / "check.json")], 170,
             results={"check": WORK / "check.json"}, group=TOGETHER),
        Step("tests", [*pytest, "-n", str(workers), "--timeout", "100", "-q",
                       "-m", "not emulator and not peers", "-k", ON_DEVICE, "tests"], 170,
             group=TOGETHER),
        _sanitized("memcheck", 170),
        _sanitized("racecheck", 170),
        Step("dispatch", [*pytest, DISPATCH, f"--benchmark-json={WORK / 'dispatch.json'}"], 20,
             results={"dispatch": WORK / "dispatch.json"}),
        Step("bench", [*pytest, "bench", "--quick", f"--ignore={DISPATCH}",
                       f"--benchmark-json={WORK / 'bench.json'}"], 190,
             results={"bench": WORK / "bench.json"}),
    ]  # fmt: skip


_IMPORT = """
import pathlib, sys
import dashpot, dashpot._C
for module in (dashpot, dashpot._C):
    if not pathlib.Path(module.__file__).is_relative_to(sys.argv[1]):
        sys.exit(f"expected the build in {sys.argv[1]}, got {module.__file__}")
"""


def cuda_ops() -> list[str]:
    """The ops with a CUDA kernel, as the bindings name them."""
    texts = [file.read_text() for file in sorted((ROOT / "csrc").rglob("*.cpp"))]
    return sorted({op for text in texts for op in re.findall(r'"(\w+)_forward_cuda"', text)})


def _sanitized(tool: str, seconds: float) -> Step:
    """A short run of the CUDA kernels alone. Without torch's cache each tensor is an allocation of
    its own, so that a read or write beyond its end is one beyond an allocation."""
    command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all"]
    command += ["--error-exitcode", "1", "--kernel-name", "kns=dashpot"]
    command += [
        sys.executable,
        "-m",
        "dashpot",
        "check",
        *cuda_ops(),
        "--backend",
        "cuda",
        "--quick",
    ]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, seconds, environment=environment, group=TOGETHER)


# --------------------------------------------------------------------------------------------
# One step


def run_step(
    step: Step, seconds: float, log: BinaryIO, prefix: str = "", stop: threading.Event | None = None
) -> dict:
    """Run a step for at most `seconds`, or until `stop` is set; its output goes to the log and to
    the terminal as it comes, each line behind the prefix.

    Returns its entry for the JSON; `outcome` is "ok", "failed" or "timed out".
    """
    tail: collections.deque[bytes] = collections.deque(maxlen=TAIL)
    _say(f"\n=== {step.name} (at most {seconds:.0f} s): {shlex.join(step.command)}\n", log)
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=_environment(step), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        _say(f"{error}\n", log)
        return _entry(step, "failed", None, 0.0, str(error))
    reader = threading.Thread(
        target=_copy, args=(process.stdout, log, tail, prefix.encode()), daemon=True
    )
    reader.start()
    stop = stop or threading.Event()
    outcome = None
    try:
        while outcome is None and process.poll() is None:
            if stop.wait(0.05) or time.monotonic() - start > seconds:
                outcome = "timed out"
    finally:
        _stop(process)
    reader.join(GRACE)
    elapsed = time.monotonic() - start
    outcome = outcome or ("ok" if process.returncode == 0 else "failed")
    text = b"".join(tail).decode(errors="replace")
    return _entry(step, outcome, process.returncode, elapsed, text)


def run_together(steps: Sequence[Step], seconds: float, log: BinaryIO) -> list[dict]:
    """Run steps at the same time; where there are several, lines bear their names."""
    if len(steps) <= 1:
        return [run_step(step, seconds, log) for step in steps]
    stop = threading.Event()
    with ThreadPoolExecutor(len(steps)) as pool:
        futures = [
            pool.submit(run_step, step, seconds, log, f"{step.name:<9} | ", stop) for step in steps
        ]
        try:
            return [future.result() for future in futures]
        finally:
            stop.set()  # after Ctrl-C nothing is left running


def _entry(step: Step, outcome: str, returncode: int | None, seconds: float, tail: str) -> dict:
    return {
        "name": step.name,
        "command": without_paths(shlex.join(step.command)),
        "outcome": outcome,
        "returncode": returncode,
        "seconds": round(seconds, 2),
        "tail": without_paths(tail),
    }


def _environment(step: Step) -> dict[str, str]:
    old = os.environ
    search = [str(SITE), *filter(None, [old.get("PYTHONPATH")])]
    return {
        **old,
        "PATH": os.pathsep.join([old.get("PATH", os.defpath), str(CUDA)]),
        "PYTHONPATH": os.pathsep.join(search),
        "PYTHONUNBUFFERED": "1",
        **step.environment,
    }


def _copy(stream: BinaryIO, log: BinaryIO, tail: collections.deque[bytes], prefix: bytes) -> None:
    for line in stream:
        tail.append(line)
        _write(prefix + line, log)


def _say(text: str, log: BinaryIO) -> None:
    _write(text.encode(), log)


def without_paths(text: str) -> str:
    """What is committed names no folder of the machine that it ran on."""
    return text.replace(sys.prefix, "PYTHON").replace(str(ROOT), ".")


_WRITING = threading.Lock()


def _write(text: bytes, log: BinaryIO) -> None:
    text = without_paths(text.decode(errors="replace")).encode()
    with _WRITING:
        for stream in (log, sys.stdout.buffer):
            stream.write(text)
            stream.flush()


def _stop(process: subprocess.Popen) -> None:
    """End a step's process and all that it started: first as Ctrl-C would, then for good."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):  # nothing is left of it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --------------------------------------------------------------------------------------------
# All steps


def grouped(steps: Sequence[Step]) -> list[list[Step]]:
    """The steps, those together that run at the same time."""
    return [list(part) for _, part in itertools.groupby(steps, lambda one: one.group or one.name)]


def longest(steps: Sequence[Step]) -> float:
    """Seconds that these steps may take at the same time."""
    return max(step.seconds for step in steps)


def run_steps(steps: Sequence[Step], folder: Path, limit: float) -> dict:
    """Run the steps in order, within `limit` seconds together; write and return the report.

    A step may take its own limit and what the steps before it left over. If the limits together are
    longer than `limit`, all are shortened alike. Ctrl-C, which ends a step, is ignored by a shell's
    background jobs and by what they start: here it counts again.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    groups = grouped(steps)
    share = min(1.0, limit / sum(longest(group) for group in groups))
    deadline = time.monotonic() + limit
    entries: dict[str, dict] = {}
    report: dict = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "limit": limit}
    report["steps"] = []
    with (folder / "gpu.log").open("wb") as log:
        for i, group in enumerate(groups):
            later = share * sum(longest(one) for one in groups[i + 1 :])
            left = deadline - time.monotonic() - later
            found, able = {}, []
            for step in group:
                for file in step.results.values():
                    file.unlink(missing_ok=True)  # an earlier run's
                if entries.get(step.needs, {}).get("outcome", "ok") != "ok":
                    found[step.name] = _entry(step, f"not run: {step.needs} failed", None, 0.0, "")
                elif left <= 0:
                    found[step.name] = _entry(step, "not run: no time left", None, 0.0, "")
                else:
                    able.append(step)
            found |= {entry["name"]: entry for entry in run_together(able, left, log)}
            for step in group:
                entries[step.name] = found[step.name]
                _collect(step, found[step.name], report)
                report["steps"].append(found[step.name])
            _save(report, folder)
        _say("\n" + table(report["steps"]), log)
    return report


def _collect(step: Step, entry: dict, report: dict) -> None:
    """Take what a step wrote into the report; a step that should have and did not has failed."""
    for key, file in step.results.items():
        problem = None
        try:
            content = json.loads(file.read_text())
        except FileNotFoundError:
            problem = f"{file.name} was not written"
        except json.JSONDecodeError as error:
            problem = f"{file.name} is not JSON: {error}"
        if problem is None:
            _merge(key, content, report)
        elif entry["outcome"] == "ok":
            entry.update(outcome="failed", tail=f"{entry['tail']}\n{problem}")


def _merge(key: str, content: dict, report: dict) -> None:
    if "benchmarks" not in content:
        report[key] = content
        return
    for row in content["benchmarks"]:
        row["stats"].pop("data", None)  # a file of an older run may hold thousands of timings
    report.setdefault("benchmarks", []).extend(content["benchmarks"])
    report.setdefault("machine_info", content.get("machine_info"))


def _save(report: dict, folder: Path) -> None:
    partial = folder / "gpu.json.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(folder / "gpu.json")


def table(entries: Sequence[dict]) -> str:
    lines = [f"{'step':<10} {'seconds':>8}  outcome"]
    for entry in entries:
        code = "" if entry["returncode"] in (0, None) else f" (exit status {entry['returncode']})"
        lines.append(f"{entry['name']:<10} {entry['seconds']:>8.1f}  {entry['outcome']}{code}")
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------------------
# The machine


def describe(file: Path) -> int:
    """Write what this machine is; 1 if torch sees no CUDA device."""
    import torch

    found = torch.cuda.is_available()
    facts = {
        "name": torch.cuda.get_device_name() if found else None,
        "capability": list(torch.cuda.get_device_capability()) if found else None,
        "memory": torch.cuda.get_device_properties().total_memory if found else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _output(["nvcc", "--version"]),
        "cpu_count": os.cpu_count(),
    }
    # The driver names its columns itself: driver, clocks and limits as they are now.
    query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    lines = (_output(["nvidia-smi", f"--query-gpu={query}", "--format=csv"]) or "").splitlines()
    if len(lines) > 1:
        names, values = (line.split(", ") for line in lines[:2])
        facts.update(zip(names, values, strict=True))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))
    if not found:
        print("torch sees no CUDA device")
    return 0 if found else 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


# --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where gpu.json and gpu.log go")
    parser.add_argument("--steps", metavar="A,B", help="only these (default: all)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help="seconds for all (default: %(default).0f)"
    )
    parser.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="build for this GPU only, or for all that a wheel serves",
    )
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.describe:
        return describe(options.folder)
    if not 0 < options.limit < float("inf"):
        parser.error(f"--limit: expected a number of seconds > 0, got {options.limit}")
    steps = all_steps(options.native)
    if options.steps:
        names = [name.strip() for name in options.steps.split(",")]
        known = [step.name for step in steps]
        for name in names:
            if name not in known:
                parser.error(f"--steps: expected some of {', '.join(known)}, got {name!r}")
        steps = [step for step in steps if step.name in names]
    report = run_steps(steps, options.folder.resolve(), options.limit)
    return 0 if all(entry["outcome"] == "ok" for entry in report["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
