"""python -m bench.report RESULTS.json [...]: tables and plots from `pytest bench --benchmark-json`.

    --table            print one markdown table per op (the default if nothing else is asked for)
    --plots DIR        one plot per family: time over size, a line per contender, the floor dashed
    --update FILE      replace what stands between <!-- bench:NAME --> and <!-- /bench --> in FILE,
                       and between <!-- ops:FAMILY --> and <!-- /ops -->

FAMILY's table tells what the sources hold: an op is served by a backend if there is a function
`<op>_forward` for it. NAME is an op, or "dispatch"; key=value pairs after it choose rows, as in
<!-- bench:flag_aggregate dtype=float32 threads=2 -->. Keys: those of a row and its options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import dashpot
from dashpot._bench import duration, megabytes, option_label, plot, size_label
from dashpot._dispatch import REGISTRY, Chain

ROOT = Path(__file__).resolve().parents[1]
OPS = re.compile(r"(<!-- ops:(?P<family>\w+) -->\n).*?(<!-- /ops -->)", re.DOTALL)
BLOCK = re.compile(r"(<!-- bench:(?P<what>[^>]*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)
_ASIDE = "reference"  # not dashpot's own speed: a column, like a peer


def read(paths: Sequence[str]) -> list[dict]:
    """The rows of pytest-benchmark files; a file that has none is an error."""
    rows = []
    for path in paths:
        found = [entry["extra_info"] for entry in json.loads(Path(path).read_text())["benchmarks"]]
        found = [row for row in found if "op" in row]
        if not found:
            raise ValueError(
                f"{path}: expected results of `pytest bench --benchmark-json`, got none"
            )
        rows += found
    return rows


# --------------------------------------------------------------------------------------------
# Selection


def value_of(row: dict, key: str) -> str:
    if key in row.get("options", {}):
        return option_label(row["options"][key])
    if key not in row:
        raise ValueError(f"key: expected one of {', '.join((*row, *row['options']))}, got {key!r}")
    return size_label(row["size"]) if key == "size" else str(row[key])


def select(rows: Sequence[dict], what: str) -> list[dict]:
    """Rows of `NAME key=value ...`; none is an error: an empty table says nothing."""
    name, *filters = what.split()
    chosen = [row for row in rows if row["op"] == name]
    for text in filters:
        key, _, value = text.partition("=")
        chosen = [row for row in chosen if value_of(row, key) in value.split(",")]
    if not chosen:
        raise ValueError(f"bench:{what}: expected at least one row, got none in these results")
    return chosen


# --------------------------------------------------------------------------------------------
# Tables


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(headers)
    return "".join("| " + " | ".join(line) + " |\n" for line in (headers, rule, *lines))


def table(rows: Sequence[dict]) -> str:
    """One op's table: a line per case, dashpot's time, its share of the floor, x against each.

    Where a gradient is formed, the peak memory (outputs and gradients included) stands beside each.
    """
    if rows[0]["op"] == "dispatch":
        return dispatch_table(rows)
    if "cell" in rows[0]:
        return cell_table(rows)
    options = list(dict.fromkeys(name for row in rows for name in row["options"]))
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        key = (row["device_name"], *_case(row, options))
        groups.setdefault(key, {})[row["contender"]] = row
    names = list(dict.fromkeys(row["contender"] for row in rows))
    others = [name for name in names if _is_peer(rows, name)]
    own = [name for name in names if name not in others] or [_ASIDE]
    others = [name for name in others if name not in own]
    several = len({key[0] for key in groups}) > 1
    memory = rows[0].get("passes") == "forward + backward"
    headers = ["size", "dtype", *options, "threads", "backend", "dashpot", "of floor"]
    headers += ["memory"] * memory
    headers = (["device"] if several else []) + headers + [f"vs {name}" for name in others]
    lines = []
    for key, group in groups.items():
        for name in own:
            if name in group:
                row = group[name]
                cells = [*key[1:], name, duration(row["median"]), f"{row['share']:.0%}"]
                cells += [megabytes(row["peak_memory"])] * memory
                cells += [_speedup(row, group.get(other), memory) for other in others]
                lines.append(([key[0]] if several else []) + cells)
    return markdown(headers, lines)


def _case(row: dict, options: Sequence[str]) -> tuple[str, ...]:
    values = (value_of(row, name) if name in row["options"] else "" for name in options)
    return (size_label(row["size"]), row["dtype"], *values, str(row["threads"]))


def _is_peer(rows: Sequence[dict], name: str) -> bool:
    if name == _ASIDE:
        return True
    return any(row["contender"] == name and row["kind"] != "backend" for row in rows)


def _speedup(row: dict, other: dict | None, memory: bool) -> str:
    if not other:
        return ""
    beside = f" ({megabytes(other['peak_memory'])})" if memory else ""
    return f"{other['median'] / row['median']:.3g}x{beside}"


def dispatch_table(rows: Sequence[dict]) -> str:
    return markdown(
        ("call", "gradient", "backend's function", "whole call", "added", "budget"),
        [
            (
                row["way"], "yes" if row["mode"] == "grad" else "no",
                f"{row['direct_us']:.2f} us", f"{row['call_us']:.2f} us",
                f"{row['added_us']:.2f} us",
                f"{row['budget_us']:g} us" if row["budget_us"] is not None else "",
            )
            for row in rows
        ],
    )  # fmt: skip


def cell_table(rows: Sequence[dict]) -> str:
    """Results of bench/models: a line per `line`, a column per `column`, the text `cell`."""
    cells = {(row["line"], row["column"]): row["cell"] for row in rows}
    if len(cells) != len(rows):
        raise ValueError("bench: expected one row per line and column, got several: choose by keys")
    lines, columns = (list(dict.fromkeys(key)) for key in zip(*cells, strict=True))
    return markdown(
        [rows[0].get("corner", ""), *columns],
        [[line, *(cells.get((line, column), "") for column in columns)] for line in lines],
    )


def tables(rows: Sequence[dict]) -> str:
    """Every op's table under its name and machine."""
    parts = []
    for name in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == name]
        machines = dict.fromkeys(f"{row['device_name']}, torch {row['torch']}" for row in chosen)
        for part in _sections(chosen):
            passes = " and ".join(dict.fromkeys(row.get("passes", "") for row in part))
            heading = " ".join((f"### {name}", *part[0].get("section", ())))
            heading += f", {passes}" * bool(passes)
            parts.append(f"{heading}\n\n{'; '.join(machines)}\n\n{table(part)}")
    return "\n".join(parts)


def _sections(rows: Sequence[dict]) -> list[list[dict]]:
    """Rows of bench/models by their `section`, "key=value" texts; others as they are."""
    parts: dict[tuple, list[dict]] = {}
    for row in rows:
        parts.setdefault(tuple(row.get("section", ())), []).append(row)
    return list(parts.values())


# --------------------------------------------------------------------------------------------
# The ops and their backends


def kernels() -> dict[str, set[str]]:
    """{"C++" | "CUDA" | "Triton": ops with a kernel there}, as the sources have them."""
    bound = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    triton = "".join(path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py"))
    return {
        "C++": set(re.findall(r'"(\w+)_forward"', bound)),
        "CUDA": set(re.findall(r'"(\w+)_forward_cuda"', bound)),
        "Triton": set(re.findall(r"^def ([a-z]\w+)_forward\(", triton, re.MULTILINE)),
    }


def ops_table(family: str) -> str:
    """The family's public ops: what they compute, their backends, their gradient."""
    places, lines = kernels(), []
    for name, op in sorted(REGISTRY.items()):
        function = getattr(dashpot.functional, name, None)
        if op.family != family or function is None:
            continue
        parts = op.ops if isinstance(op, Chain) else (op,)
        served = [sum(part.name in ops for part in parts) for ops in places.values()]
        cells = ["yes" if n == len(parts) else "in parts" if n else "-" for n in served]
        what = " ".join(inspect.getdoc(function).partition("\n\n")[0].split())
        what = re.split(r"[.:] ", what)[0].removesuffix(".").replace("|", "\\|")
        what = re.sub(r":math:`([^`]*)`", r"$\1$", what)
        lines.append((f"`{name}`", what, *cells, "yes" if op.differentiable else "-"))
    if not lines:
        raise ValueError(f"ops:{family}: expected a family with public ops, got none")
    return markdown(("op", "what it computes", *places, "gradient"), lines)


def update_ops(text: str) -> str:
    """`text` with every family's table replaced."""
    return OPS.sub(lambda m: f"{m[1]}{ops_table(m['family'])}{m[3]}", text)


def update(text: str, rows: Sequence[dict]) -> str:
    """`text` with every block's content replaced."""
    if not BLOCK.search(text):
        raise ValueError("--update: expected a <!-- bench:NAME --> ... <!-- /bench -->, got none")
    return BLOCK.sub(lambda m: f"{m[1]}{table(select(rows, m['what']))}{m[3]}", text)


# --------------------------------------------------------------------------------------------
# Plots


def plots(rows: Sequence[dict], folder: str) -> list[Path]:
    """One file per family and device: the first dtype and the largest thread count, a panel for
    each op and its options."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row["op"] in REGISTRY]
    files = []
    for family, device in dict.fromkeys((_family(row), row["device"]) for row in rows):
        chosen = [row for row in rows if (_family(row), row["device"]) == (family, device)]
        threads = max(row["threads"] for row in chosen)
        firsts = {name: _first_dtype(chosen, name) for name in {row["op"] for row in chosen}}
        chosen = [
            row for row in chosen if row["threads"] == threads and row["dtype"] == firsts[row["op"]]
        ]
        title = f"{chosen[0]['device_name']}, {threads} threads, torch {chosen[0]['torch']}"
        files.append(Path(folder) / f"{family}_{device}.svg")
        plot(chosen, str(files[-1]), title, _panel)
    return files


def _family(row: dict) -> str:
    return REGISTRY[row["op"]].family


def _first_dtype(rows: Sequence[dict], op: str) -> str:
    return next(row["dtype"] for row in rows if row["op"] == op)


def _panel(row: dict) -> str:
    options = [f"{name}={value_of(row, name)}" for name in row["options"]]
    return " ".join((row["op"], row["dtype"], *options))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plots", metavar="DIR")
    parser.add_argument("--update", metavar="FILE")
    options = parser.parse_args(argv)
    try:
        rows = read(options.results)
        if options.table or not (options.plots or options.update):
            print(tables(rows), end="")
        if options.plots:
            for file in plots(rows, options.plots):
                print(file, file=sys.stderr)
        if options.update:
            path = Path(options.update)
            path.write_text(update(update_ops(path.read_text()), rows))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
