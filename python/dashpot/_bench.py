"""`python -m dashpot bench`: every op x backend x size of the declarations, timed; and the plot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from dashpot import _measure
from dashpot._dispatch import REGISTRY, Op
from dashpot._info import environment
from dashpot._terminal import progress, table

_SMALL = 1 << 24  # elements that --sizes small admits
HEADERS = ("op", "size", "dtype", "by", "median", "20% .. 80%", "GB/s", "of floor", "vs eager",
           "vs compiled", "memory")  # fmt: skip
COMPILED = "torch.compile"


@dataclass
class Results:
    """What was measured so far; kept when the run is interrupted."""

    environment: dict
    rows: list[_measure.Row] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def write(self, path: str) -> None:
        content = {**asdict(self), "rows": [asdict(row) for row in self.rows]}
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def sizes_of(op, which: str) -> list[tuple]:
    """small: the sizes of at most 16 M elements, judged by the numbers in the size."""
    if which == "all":
        return op.sizes["bench"]
    return [
        size
        for size in op.sizes["bench"]
        if math.prod(n for n in size if isinstance(n, int)) <= _SMALL
    ]


def run(
    ops: Sequence[str],
    results: Results,
    *,
    device: str,
    dtype: torch.dtype,
    sizes: str,
    seconds: float,
    compiled: bool,
    peak_flops: float | None,
    step: Callable,
) -> None:
    """Fill `results` row by row."""
    copy = _measure.CopyLoop(device)
    for name in ops:
        op = REGISTRY[name]
        for size in sizes_of(op, sizes):
            step(f"{name} {size}")
            case = _measure.case(op, size, dtype, device)
            inputs = _measure.rotated(case.args, device)
            contenders = [(backend, None) for backend in case.backends()]
            if compiled and isinstance(op, Op):  # a chain's ops are opaque to the compiler
                contenders.append((COMPILED, _measure.Peer(torch.compile(op.reference))))
            for contender, peer in contenders:
                try:
                    row, _ = _measure.measure(
                        case, contender, seconds=seconds, peer=peer, copy=copy, inputs=inputs,
                        peak_flops=peak_flops,
                    )  # fmt: skip
                except _measure.RefusedError as error:
                    results.refused.append(str(error))
                else:
                    results.rows.append(row)


def main(
    ops: Sequence[str],
    *,
    device: str,
    dtype: torch.dtype,
    sizes: str,
    seconds: float,
    compiled: bool,
    peak_flops: float | None,
    json_file: str | None,
    plot_file: str | None,
) -> int:
    """The command; the exit code is 0, 1 if a wrong result was refused, 130 after Ctrl-C."""
    results, code = Results(environment(device)), 0
    total = sum(len(sizes_of(REGISTRY[name], sizes)) for name in ops)
    try:
        with progress(total, "timing") as step:
            run(ops, results, device=device, dtype=dtype, sizes=sizes, seconds=seconds,
                compiled=compiled, peak_flops=peak_flops, step=step)  # fmt: skip
    except KeyboardInterrupt:
        print("Interrupted: what follows was measured before.")
        code = 130
    finally:
        _report(results, json_file, plot_file)
    return code or int(bool(results.refused))


def _report(results: Results, json_file: str | None, plot_file: str | None) -> None:
    machine = results.environment
    title = f"{machine['device_name']}, {machine['threads']} threads, torch {machine['torch']}"
    table(HEADERS, [_cells(row, results.rows) for row in results.rows], title)
    for line in results.refused:
        print(f"refused: {line}")
    if json_file:
        results.write(json_file)
    if plot_file and results.rows:
        plot([asdict(row) for row in results.rows], plot_file, title)


def _cells(row: _measure.Row, rows: Sequence[_measure.Row]) -> tuple[str, ...]:
    def speedup(other: str) -> str:
        key = (row.op, row.size, row.dtype, other)
        found = [r for r in rows if (r.op, r.size, r.dtype, r.contender) == key]
        return f"{found[0].median / row.median:.2f}x" if found else "-"

    return (
        row.op, size_label(row.size), row.dtype, row.contender, duration(row.median),
        f"{duration(row.p20)} .. {duration(row.p80)}", f"{row.gbps:.1f}", f"{row.share:.0%}",
        speedup("reference"), speedup(COMPILED), megabytes(row.peak_memory),
    )  # fmt: skip


def size_label(size: Sequence) -> str:
    return "x".join(f"{n:.0e}".replace("e+0", "e") if _round(n) else str(n) for n in size)


def _round(n) -> bool:
    return isinstance(n, int) and n >= 10_000 and n == float(f"{n:.0e}")


def duration(seconds: float) -> str:
    scale, unit = (1.0, "s") if seconds >= 1 else (1e-3, "ms") if seconds >= 1e-3 else (1e-6, "us")
    return f"{seconds / scale:.3g} {unit}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def option_label(value) -> str:
    return (
        f"{value:g}"
        if isinstance(value, float | int) and not isinstance(value, bool)
        else str(value)
    )


# --------------------------------------------------------------------------------------------
# Plot


def plot(
    rows: Sequence[dict],
    path: str,
    title: str = "",
    panel: Callable[[dict], str] = lambda row: f"{row['op']} {row['dtype']}",
) -> None:
    """Time over size, a line per contender and the floor as a dashed line, a panel per op.

    rows: as `asdict(Row)`; the size is what the floor moves, in bytes. panel: the panel of a row.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(panel(row) for row in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for name, axis in zip(panels, axes, strict=False):
        _panel(axis, [row for row in rows if panel(row) == name])
        axis.set_title(name)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "dashpot"}):  # small, reproducible
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def _panel(axis, rows: Sequence[dict]) -> None:
    sizes = {row["bytes"] / 1e6: size_label(row["size"]) for row in rows}
    floors = {
        x: min(r["floor"] for r in rows if r["bytes"] / 1e6 == x) * 1e3 for x in sorted(sizes)
    }
    for contender in dict.fromkeys(row["contender"] for row in rows):
        points = sorted(
            (row["bytes"] / 1e6, row["median"] * 1e3, row["p20"] * 1e3, row["p80"] * 1e3)
            for row in rows
            if row["contender"] == contender
        )
        x, median, p20, p80 = zip(*points, strict=True)
        (line,) = axis.loglog(x, median, marker="o", markersize=3, label=contender)
        axis.fill_between(x, p20, p80, alpha=0.2, color=line.get_color())
    axis.loglog(floors.keys(), floors.values(), "k--", linewidth=1, label="floor (plain copy)")
    axis.set_xticks(list(sizes), list(sizes.values()), fontsize="x-small", rotation=30)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("size, placed by the bytes that must move")
    axis.set_ylabel("time, ms")
    axis.legend(fontsize="x-small")
