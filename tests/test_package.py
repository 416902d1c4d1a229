"""The package as an installed thing: what its import needs, says and leaves alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import dashpot

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def run(code: str, **environment) -> subprocess.CompletedProcess:
    """Python code in a process of its own, with warnings shown."""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done


WITHOUT_MODULE = "import sys; sys.modules['dashpot._C'] = None\n"
USE = """
import dashpot, torch
rows = torch.randn(5, 100)
print(dashpot.explain(dashpot.flag_aggregate, rows))
assert dashpot.flag_aggregate(rows).isfinite().all()
"""


def test_without_the_compiled_module():
    """Everything works by the reference, and one line says so."""
    done = run(WITHOUT_MODULE + USE)
    warnings = [line for line in done.stderr.splitlines() if "dashpot was installed" in line]
    assert len(warnings) == 1 and "reference" in warnings[0]
    assert done.stderr.count("Warning") == 1
    assert re.findall(r"^(\w+) +reference +chosen", done.stdout, re.MULTILINE) == [
        "gram", "flag_coeffs", "combine",
    ]  # fmt: skip
    assert re.search(r"^gram +cpp +not built: ", done.stdout, re.MULTILINE)


def test_with_the_compiled_module_nothing_is_said():
    done = run(USE)
    assert "dashpot was installed" not in done.stderr
    assert re.findall(r"^(\w+) +cpp +chosen", done.stdout, re.MULTILINE) == [
        "gram", "flag_coeffs", "combine",
    ]  # fmt: skip


def test_without_triton():
    done = run("import sys; sys.modules['triton'] = None\n" + USE)
    assert re.search(r"^gram +triton +not built: .*triton", done.stdout, re.MULTILINE)
    assert re.search(r"^gram +cpp +chosen", done.stdout, re.MULTILINE)


def test_import_is_light():
    """Nothing but torch (and what torch itself brings) is imported, no CUDA context made."""
    code = """
import sys, torch
before = set(sys.modules)
import dashpot
new = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(*sorted(new))
assert not torch.cuda.is_initialized()
"""
    done = run(code)
    allowed = {"dashpot", "_dashpot_editable", "torch"}
    assert set(done.stdout.split()) <= allowed


def test_import_needs_no_other_package():
    """torch itself may look for them; dashpot must do without."""
    run("""
import sys, torch
for name in ("triton", "matplotlib", "rich", "numpy", "sklearn"):
    for module in [one for one in sys.modules if one.partition(".")[0] == name]:
        del sys.modules[module]
    sys.modules[name] = None
import dashpot
dashpot.flag_aggregate(torch.randn(5, 100))
""")


def field(name: str) -> str:
    return re.search(rf"^{name} = (.*)$", PROJECT, re.MULTILINE)[1]


def test_versions_agree():
    assert field("version") == f'"{dashpot.__version__}"'


def test_torch_is_the_only_dependency():
    """And has no upper bound: the wheel is bound to Python's version only."""
    assert re.fullmatch(r'\["torch>=[\d.]+"\]', field("dependencies"))
    assert field("requires-python") == '">=3.10"'


def test_the_wheel_holds_both_trees():
    """python/dashpot and triton_kernels become one package; a top-level triton_kernels would hide
    another project's package of that name."""
    table = PROJECT.split("[tool.scikit-build.wheel.packages]")[1].split("[")[0]
    assert '"dashpot" = "python/dashpot"' in table
    assert '"dashpot/triton_kernels" = "triton_kernels"' in table
    assert not (ROOT / "triton_kernels" / "__init__.py").exists()
    done = run("import dashpot.triton_kernels.aggregate as family; print(family.__file__)")
    installed = Path(done.stdout.strip())  # the same file in an editable install, else a copy
    assert installed.read_text() == (ROOT / "triton_kernels" / "aggregate.py").read_text()
