"""Builds CUDA sources for the CPU: `.cu` files as host C++, in one pybind11 module.

    module = load()                   # csrc/ as a whole
    module = load([a_cpp, b_cu])      # other sources
    set_seed(module, 7)               # another order of threads, lanes and blocks

With `sanitize=True` the module is built under AddressSanitizer (and the checks for misaligned
vector accesses and for indices beyond an array's type), which then watches static and dynamic
shared memory, local arrays and, because it replaces malloc, the tensors' memory. Python itself is
not built so, hence the runtime has to be loaded first, by the environment that
`sanitizer_environment()` returns:

    LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so.6)"
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
    DASHPOT_EMULATOR_SANITIZE=1

libstdc++ is there because the sanitizer looks for __cxa_throw when it starts, before any module
could load it; without it the first C++ exception aborts. Leaks are not looked for, as Python leaves
many at its exit. PYTHONMALLOC takes Python's small-object arenas, which have no guard zones, out of
use. `load()` builds the sanitized module where the last variable is set, so that

    eval "$(python tests/emulator/build.py --sanitize)" and then pytest …

runs any test that uses `load()` under AddressSanitizer. An error ends the process with a report.

Object files are kept under build/emulator/ and reused while the files they were made from, the
flags and the compiler are the same. Processes may build at the same time: a lock lets one do it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulator"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))

FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wno-unknown-pragmas",  # #pragma unroll
    "-DDASHPOT_EMULATE",
    "-DDASHPOT_CUDA=1",
]
# The line tables of -g1 are what a report needs; with all of -g this takes half as long again.
SANITIZE_FLAGS = ["-g1", "-fsanitize=address", "-fno-omit-frame-pointer"]
# For device code: what a GPU faults on or wraps around silently, and a CPU shrugs off.
SANITIZE_CUDA_FLAGS = ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
# The assembler's complaint about a __shared__ variable with external linkage: see cuda_emulator.h.
LINKAGE_WARNING = "incorrect section type for .noinit"


def default_sources() -> list[Path]:
    """The CUDA sources, the bindings that name CUDA kernels, and what opens the module: the rest of
    csrc/ are CPU kernels, which take long to compile."""
    bindings = [path for path in CSRC.rglob("*.cpp") if "DASHPOT_CUDA" in path.read_text()]
    return sorted({*bindings, CSRC / "module.cpp"}) + sorted(CSRC.rglob("*.cu"))


def build(
    sources: Sequence[Path] | None = None, *, sanitize: bool = False, name: str = "_emulated"
) -> Path:
    """Compiles `sources` (csrc/ by default) and the emulator; returns the module's path.

    One of the sources opens the module with `PYBIND11_MODULE(DASHPOT_MODULE, m)`; `name` is what
    DASHPOT_MODULE stands for; other sources want another name, to be kept apart. Raises
    RuntimeError with the compiler's words where it fails.
    """
    sources = [Path(source).resolve() for source in sources or default_sources()]
    sources.append(EMULATOR / "cuda_emulator.cpp")
    script = EMULATOR / "cuda_emulator.ld"
    includes = ["-I", CSRC, "-I", EMULATOR, "-isystem", pybind11.get_include()]
    includes += ["-isystem", sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(SANITIZE_FLAGS if sanitize else []), f"-DDASHPOT_MODULE={name}", *includes]
    cuda_flags = ["-x", "c++", *(SANITIZE_CUDA_FLAGS if sanitize else [])]
    version = [_run([*COMPILER, "--version"]), pybind11.__version__]
    folder = BUILD / (name + "-sanitized" * sanitize)
    with _locked(folder), ThreadPoolExecutor(max_workers=2) as pool:
        objects = [
            Object(
                source, folder, [*flags, *(cuda_flags if source.suffix == ".cu" else [])], version
            )
            for source in sources
        ]
        list(pool.map(Object.refresh, objects))
        # A path of its own for each state of the sources: Python imports a path only once, and a
        # process may have the last one loaded.
        state = _digest([object.state for object in objects], [script])
        module = folder / "module" / state / f"{name}.so"
        if not module.exists():
            shutil.rmtree(folder / "module", ignore_errors=True)
            module.parent.mkdir(parents=True)
            runtimes = [*flags, *(SANITIZE_CUDA_FLAGS if sanitize else [])]
            paths = [object.path for object in objects]
            _run_to(module, [*COMPILER, "-shared", *runtimes, *paths, f"-Wl,-T,{script}"])
    return module


def load(
    sources: Sequence[Path] | None = None, *, sanitize: bool | None = None, name: str = "_emulated"
) -> ModuleType:
    """Builds and imports the module; `sanitize=None` leaves it to DASHPOT_EMULATOR_SANITIZE."""
    if sanitize is None:
        sanitize = os.environ.get("DASHPOT_EMULATOR_SANITIZE", "0") != "0"
    if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        raise RuntimeError(
            "a sanitized module needs AddressSanitizer to be loaded before Python: "
            "start the process with sanitizer_environment()"
        )
    spec = importlib.util.spec_from_file_location(
        name, build(sources, sanitize=sanitize, name=name)
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def set_seed(module: ModuleType, seed: int) -> None:
    """Seeds the order in which the module runs blocks, threads and lanes from here on."""
    ctypes.CDLL(module.__file__).dashpot_emulator_set_seed(ctypes.c_uint64(seed))


def sanitizer_environment() -> dict[str, str]:
    """The environment, os.environ included, for a Python process that loads a sanitized module."""
    runtimes = [
        _run([*COMPILER, f"-print-file-name={library}"]).strip()
        for library in ("libasan.so", "libstdc++.so.6")
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "DASHPOT_EMULATOR_SANITIZE": "1",
    }


class Object:
    """The object file of one source, with what it was made from: flags, compiler and contents."""

    def __init__(self, source: Path, folder: Path, flags: list, version: list[str]):
        self.source = source
        self.path = folder / f"{source.stem}-{_digest([str(source)])}.o"
        self.dependencies = self.path.with_suffix(".d")  # written by the compiler
        self.recorded = self.path.with_suffix(".state")
        self.command = [*COMPILER, *flags, "-Wa,--fatal-warnings", "-c", source]
        self.version = version
        self.state = ""

    def refresh(self) -> None:
        """Compiles if any file that the last compilation read has changed since."""
        if self.recorded.exists():
            self.state = self.current_state()
            if self.state and self.state == self.recorded.read_text():
                return
        self.recorded.unlink(missing_ok=True)
        started = time.time()
        try:
            _run_to(self.path, [*self.command, "-MMD", "-MF", self.dependencies])
        except RuntimeError as error:
            if LINKAGE_WARNING not in str(error):
                raise
            raise RuntimeError(
                f"{self.source}: a template or inline function with a __shared__ variable has "
                f"external linkage, and so no guard zones: put it into an anonymous namespace"
            ) from error
        self.state = self.current_state()
        # A file saved meanwhile may be newer than what was compiled: then compile again next time.
        if all(path.stat().st_mtime < started for path in self.read_files()):
            self.recorded.write_text(self.state)

    def read_files(self) -> list[Path]:
        _, names = self.dependencies.read_text().replace("\\\n", " ").split(":", 1)
        return [Path(name) for name in shlex.split(names)]

    def current_state(self) -> str:
        """A digest; empty where a file has gone."""
        try:
            return _digest([*map(str, self.command), *self.version], self.read_files())
        except FileNotFoundError:
            return ""


def _run_to(out: Path, command: list) -> None:
    """Runs a compiler command; `out` appears when it is complete."""
    partial = out.with_suffix(".partial")
    _run([*command, "-o", partial])
    os.replace(partial, out)


def _run(command: Iterable) -> str:
    command = [str(word) for word in command]
    # The compiler itself is not to run under AddressSanitizer.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _digest(texts: Iterable[str], files: Iterable[Path] = ()) -> str:
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode() + b"\0")
    for file in files:
        sha.update(str(file).encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="Build csrc/ for the CUDA emulator.")
    parser.add_argument(
        "--sanitize",
        action="store_true",
        help="under AddressSanitizer; prints the environment to run under, for eval",
    )
    sanitize = parser.parse_args().sanitize
    module = build(sanitize=sanitize)
    if not sanitize:
        print(module)
        return
    for key, value in sanitizer_environment().items():
        if os.environ.get(key) != value:
            print(f"export {key}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
