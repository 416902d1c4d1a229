"""Keeps the house in order: the same rooms on each level, an op's files where they are looked for,
public functions documented, no kernel without a test."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from pathlib import Path

import dashpot
import pytest
import torch
from dashpot._backends import BACKENDS, Kernel
from dashpot._dispatch import REGISTRY, Chain, Op

ROOT = Path(__file__).resolve().parents[1]
CODE = ("csrc", "triton_kernels", "python", "tests", "bench")
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
SOURCES = sorted(
    path
    for folder in CODE
    for path in (ROOT / folder).rglob("*")
    if path.suffix in SUFFIXES and "__pycache__" not in path.parts
)
NOT_FAMILIES = {"common", "emulator", "models", "ranks", "results"}  # folders beside the families'


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def stems(folder: str) -> set[str]:
    """Names of the public files and folders in a folder."""
    return {
        path.stem
        for path in (ROOT / folder).iterdir()
        if path.stem[0] not in "._" and (path.is_dir() or path.suffix == ".py")
    }


# Plain modules beside the families: what is built on ops and declares none.
MODULES = {"attacks", "distributed", "flower"}
FAMILIES = stems("python/dashpot") - MODULES - {"functional"}


# --------------------------------------------------------------------------------------------
# Rooms and files


def test_there_are_families_and_ops():
    assert {"aggregate"} <= FAMILIES
    assert {op.family for op in REGISTRY.values()} == FAMILIES


@pytest.mark.parametrize("level", ["csrc", "triton_kernels", "tests", "bench"])
def test_rooms_are_those_of_the_package(level):
    """A family may lack kernels, but there is no room that the package does not have."""
    rooms = stems(level) - NOT_FAMILIES
    rooms -= {path.stem for path in (ROOT / level).glob("*.py") if level != "triton_kernels"}
    assert rooms <= FAMILIES
    if level in ("tests", "bench"):
        assert rooms == FAMILIES


@pytest.mark.parametrize("op", REGISTRY)
def test_op_has_a_test_and_a_benchmark(op):
    family = REGISTRY[op].family
    assert (ROOT / "tests" / family / f"test_{op}.py").is_file()
    assert (ROOT / "bench" / family / f"bench_{op}.py").is_file()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_module_has_a_test(module):
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


@pytest.mark.parametrize("level", ["tests", "bench"])
def test_files_of_a_room_are_named_after_ops(level):
    """Or, where a family has files of Modules or helpers too, tests after those."""
    prefix = {"tests": "test_", "bench": "bench_"}[level]
    for family in FAMILIES:
        named = {path.stem for path in (ROOT / level / family).glob(f"{prefix}*.py")}
        ops = {f"{prefix}{op.name}" for op in REGISTRY.values() if op.family == family}
        files = {f"{prefix}{name.lstrip('_')}" for name in files_of(family)}
        assert ops <= named <= (ops | files if level == "tests" else ops)


def files_of(family: str) -> set[str]:
    """The files of a family that is a folder."""
    return {path.stem for path in (ROOT / "python/dashpot" / family).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize(
    ("family", "file"),
    [(family, file) for family in sorted(FAMILIES) for file in sorted(files_of(family))
     if file[0] != "_" and file not in REGISTRY],
)  # fmt: skip
def test_file_beside_the_ops_has_a_test(family, file):
    assert (ROOT / "tests" / family / f"test_{file}.py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_file_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{lines} lines; a family's file may become a folder of one file per op"


# --------------------------------------------------------------------------------------------
# Kernels: each belongs to an op of its room, is found by the dispatcher, and is tested


def declared() -> list[tuple[str, str, str]]:
    """(backend, family, function) of every kernel function that the sources declare."""
    found = []
    for path in (ROOT / "csrc").rglob("*.cpp"):
        for name in re.findall(r'^[^/\n]*\bm\.def\(\s*"(\w+)"', path.read_text(), re.MULTILINE):
            backend = "cuda" if name.endswith("_cuda") else "cpp"
            found.append((backend, path.parent.name, name.removesuffix("_cuda")))
    for path in (ROOT / "triton_kernels").rglob("*.py"):
        for name in re.findall(r"^def ([a-z]\w+)\(", path.read_text(), re.MULTILINE):
            family = path.relative_to(ROOT / "triton_kernels").parts[0].removesuffix(".py")
            found.append(("triton", family, name))
    parts = ("_forward", "_backward", "_supports")
    return [entry for entry in found if entry[2].endswith(parts)]


DECLARED = declared()
FORWARD = [
    (b, name.removesuffix("_forward")) for b, _, name in DECLARED if name.endswith("_forward")
]


def test_there_are_kernels():
    assert {backend for backend, _ in FORWARD} == {"cpp", "cuda", "triton"}


@pytest.mark.parametrize("entry", DECLARED, ids="-".join)
def test_kernel_belongs_to_an_op_of_its_room(entry):
    backend, family, name = entry
    op, part = name.rsplit("_", 1)
    assert isinstance(REGISTRY.get(op), Op), f"{name} in csrc/ or triton_kernels/: no op {op}"
    assert REGISTRY[op].family == family
    assert part == "forward" or (backend, op) in FORWARD


@pytest.mark.parametrize(("name", "op"), FORWARD)
def test_kernel_is_found(name, op):
    """The compiled module is there and holds what its sources declare; so does Triton's."""
    if name == "cuda" and not torch.cuda.is_available():
        name = "emulator"
    kernel = REGISTRY[op].kernel(name)
    assert isinstance(kernel, Kernel), kernel


def here(backend: str) -> bool:
    """Whether the backend can run in this process."""
    if backend == "cuda":
        return torch.cuda.is_available()
    return backend != "triton" or torch.cuda.is_available() or "cpu" in BACKENDS["triton"].devices


HERE = [
    pytest.param(*entry, marks=pytest.mark.triton if entry[0] == "triton" else ())
    for entry in FORWARD
    if here(entry[0])
]


@pytest.mark.parametrize(("name", "op"), HERE)
def test_kernel_is_tested(grid, name, op):
    """test_every_op.py has a case for it (one that it does not decline)."""
    assert any((case.backend, case.op.name) == (name, op) for case in grid)


EMULATED = [op for backend, op in FORWARD if backend == "cuda"]


@pytest.mark.emulator
@pytest.mark.parametrize("op", EMULATED)
def test_cuda_kernel_is_tested_by_the_emulator(grid, op):
    assert any((case.backend, case.op.name) == ("emulator", op) for case in grid)


# --------------------------------------------------------------------------------------------
# Public functions


@pytest.mark.parametrize("op", REGISTRY)
def test_op_is_importable_from_three_places(op):
    function = getattr(dashpot, op)
    assert function is getattr(dashpot.functional, op)
    assert function is getattr(getattr(dashpot, REGISTRY[op].family), op)
    assert op in getattr(dashpot, REGISTRY[op].family).__all__


def public_functions():
    for name in sorted((FAMILIES | MODULES) - {"flower"}):  # a class, of a library that may lack
        module = importlib.import_module(f"dashpot.{name}")
        for function in (getattr(module, name) for name in module.__all__):
            if inspect.isfunction(function):
                yield function


def section(docstring: str, title: str) -> str:
    """The indented text under `title:`."""
    found = re.search(rf"^{title}:\n((?:(?:    .*)?\n?)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def entries(text: str) -> dict[str, str]:
    """{argument: what is said of it} from an Args section; "a, b: ..." speaks of both."""
    parts = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n     .*|\n(?=\s*\n))*)", text, re.MULTILINE)
    return {name: said for names, said in parts for name in names.split(", ")}


SHAPE = r"\((\.\.\.|[\w*+]+, ?[^()]*)\)"  # (p,), (B, D), (p, ...), (...)


@pytest.mark.parametrize("function", list(public_functions()), ids=lambda f: f.__name__)
def test_docstring(function):
    """Args for each parameter, a shape "(...)" for each tensor, Returns and Raises."""
    docstring = inspect.getdoc(function)
    said = entries(section(docstring, "Args"))
    parameters = inspect.signature(function).parameters
    assert set(said) == set(parameters)
    for name, parameter in parameters.items():
        if re.search("Tensor|Grads", str(parameter.annotation)) and name != "out":
            assert re.search(r"\([^()]*(\.\.\.|\w,|,\s*\w)[^()]*\)", said[name]), (
                f"{name}: no shape"
            )
    assert section(docstring, "Returns").strip()
    assert section(docstring, "Raises").strip()


@pytest.mark.parametrize("op", [op.name for op in REGISTRY.values() if isinstance(op, Op)])
def test_op_is_declared_with_what_tests_and_benchmarks_need(op):
    op = REGISTRY[op]
    assert op.sizes["test"] and op.sizes["bench"]
    assert len(op.reference.__doc__ or "") > 20
    assert not op.differentiable or op.reference_backward is not None
    for size in op.sizes["test"]:
        bytes_, flops = op.floor(*op.inputs(size, torch.float32, "cpu", 0))
        assert bytes_ > 0 and flops >= 0


def test_chains_are_made_of_declared_ops():
    for chain in (entry for entry in REGISTRY.values() if isinstance(entry, Chain)):
        assert chain.ops and all(REGISTRY[op.name] is op for op in chain.ops)


# --------------------------------------------------------------------------------------------
# Text


FORBIDDEN = {
    "unfinished work": r"\b(TODO|FIXME|XXX|HACK)\b",
    "an error hidden": r"except (Base)?Exception\b|except:",
    "a test left out": r"pytest\.(skip|xfail|importorskip)|mark\.(skip|xfail)",
    "a path of one machine": r"(?<![\w.])/(work|root|home|Users)/\w",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden_text(what):
    texts = {path: path.read_text() for path in SOURCES if path != Path(__file__).resolve()}
    assert len(texts) > 20
    assert [label(path) for path, text in texts.items() if re.search(FORBIDDEN[what], text)] == []


def test_triton_offsets_are_64_bit():
    """A program's number times its share of the work passes 2^31: widened where it is read."""
    lines = [
        f"{label(path)}:{number}: {line.strip()}"
        for path in SOURCES
        if path.parts[len(ROOT.parts)] == "triton_kernels"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "tl.program_id(" in line
    ]
    assert lines
    assert [line for line in lines if ".to(tl.int64)" not in line] == []


def test_the_readers_of_sources_see_what_they_should(tmp_path):
    """The patterns above, on text that breaks each rule."""
    broken = {
        "unfinished work": "# TO" + "DO later",
        "an error hidden": "except Exc" + "eption:",
        "a test left out": "@pytest.mark.sk" + "ip",
        "a path of one machine": "open('" + os.sep + "home/me/x')",
    }
    assert all(re.search(FORBIDDEN[what], text) for what, text in broken.items())
    assert entries("    a, b: (p,) x\n      more\n    c: y\n") == {
        "a": "(p,) x\n      more", "b": "(p,) x\n      more", "c": "y",
    }  # fmt: skip
