"""What the runs in this folder share: the command line, a row of a table, where rows go."""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from dashpot._info import environment

from bench.report import tables


def parser(op: str, doc: str) -> argparse.ArgumentParser:
    """Knows --json; a run adds what is its own."""
    made = argparse.ArgumentParser(
        prog=f"python -m bench.models.{op}", description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--json", metavar="FILE", help="write the rows, for python -m bench.report")
    return made


@functools.cache
def _machine() -> dict:
    return {key: environment("cpu")[key] for key in ("device_name", "torch")}


def row(op: str, corner: str, line: str, column: str, value: float, cell: str,
        section: dict | None = None, **facts) -> dict:  # fmt: skip
    """One cell of a table of lines and columns; `corner` heads the lines. Rows of one `section`
    make one table; facts are what a marker in a text may choose rows by, beside the section."""
    section = section or {}
    return {
        "op": op, **section, **facts, "corner": corner,
        "section": [f"{key}={one}" for key, one in section.items()], "line": line,
        "column": column, "value": value if math.isfinite(value) else None, "cell": cell,
        "options": {}, **_machine(),
    }  # fmt: skip


def publish(rows: Sequence[dict], file: str | None) -> None:
    """Print tables; write the JSON that `bench.report` reads."""
    print(tables(rows), end="")
    if file:
        results = {"benchmarks": [{"extra_info": row} for row in rows]}
        Path(file).write_text(json.dumps(results, indent=1) + "\n")
