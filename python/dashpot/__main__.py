"""python -m dashpot info | check | bench | demo: what runs here, is it right, how fast, on what."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dashpot import _bench, _check, _info
from dashpot._backends import BACKENDS
from dashpot._dispatch import REGISTRY
from dashpot._terminal import progress, table

_DTYPES = ("float32", "bfloat16", "float16", "float64")


def _op(name: str) -> str:
    if name not in REGISTRY:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(REGISTRY)}, got {name!r}")
    return name


def _positive(kind: type):
    def convert(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _plot_file(text: str) -> str:
    if Path(text).suffix not in (".svg", ".png", ".pdf"):
        raise argparse.ArgumentTypeError(f"expected a file .svg, .png or .pdf, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib: pip install 'dashpot[demo]'")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dashpot", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, machine, and which backend serves which op")

    check = commands.add_parser("check", help="compare every backend with the float64 reference")
    check.add_argument("ops", nargs="*", type=_op, metavar="OP", help="default: all")
    check.add_argument("--device", choices=_info.devices(), help="default: all of this machine")
    check.add_argument(
        "--backend", choices=(*BACKENDS, "reference"), help="this one alone; default: all"
    )
    check.add_argument("--quick", action="store_true", help="the first sizes alone")
    check.add_argument("--json", metavar="FILE", help="write the verdicts")

    bench = commands.add_parser("bench", help="time every op on every backend")
    bench.add_argument("ops", nargs="*", type=_op, metavar="OP", help="default: all")
    bench.add_argument("--device", choices=_info.devices(), default=_info.default_device())
    bench.add_argument("--dtype", choices=_DTYPES, default="float32")
    bench.add_argument(
        "--sizes", choices=("small", "all"), default="small", help="small: at most 16 M elements"
    )
    bench.add_argument("--threads", type=_positive(int), metavar="N", help="on the CPU")
    bench.add_argument(
        "--time", type=_positive(float), default=0.25, metavar="SECONDS", help="per row"
    )
    bench.add_argument(
        "--compile",
        action="store_true",
        help="also time torch.compile of the reference (slow to compile)",
    )
    bench.add_argument(
        "--peak-gflops",
        type=_positive(float),
        metavar="N",
        help="count operations too: the floor is the larger bound",
    )
    bench.add_argument("--json", metavar="FILE", help="write the rows")
    bench.add_argument("--plot", type=_plot_file, metavar="FILE", help="time over size: svg or png")

    demo = commands.add_parser("demo", help="train on real images with Byzantine workers")
    demo.add_argument("--output", metavar="PATH", help="where the plot goes")
    demo.add_argument("--quick", action="store_true", help="fewer steps")
    return parser


def _run_info() -> int:
    table(("", "version"), _info.versions())
    table(_info.availability_headers(), _info.availability(), "op x backend (float32)")
    return 0


def _run_check(ops, devices, json_file, only: str | None, quick: bool) -> int:
    rows: dict[tuple, _check.Row] = {}
    interrupted = False
    try:
        with progress(_check.count(ops, "test", devices, quick), "checking") as step:
            _check.check(ops, devices, rows, step, only=only, quick=quick)
    except KeyboardInterrupt:
        print("Interrupted: what follows was checked before.")
        interrupted = True
    finally:
        table(_check.HEADERS, [row.cells() for row in rows.values()])
        if json_file:
            content = {
                "environment": _info.environment(devices[-1]),
                "rows": [row.as_dict() for row in rows.values()],
            }
            Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    failed = [row for row in rows.values() if not row.ok]
    print(f"{len(rows) - len(failed)} of {len(rows)} agree with the float64 reference")
    return 130 if interrupted else int(bool(failed) or not rows)


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.command == "info":
        return _run_info()
    if options.command == "demo":
        from dashpot import _demo

        return _demo.run(output=options.output, quick=options.quick) or 0
    ops = options.ops or list(REGISTRY)
    if options.command == "check":
        devices = (options.device,) if options.device else _info.devices()
        return _run_check(ops, devices, options.json, options.backend, options.quick)
    with _check.threads(options.threads or torch.get_num_threads()):
        return _bench.main(
            ops, device=options.device, dtype=getattr(torch, options.dtype), sizes=options.sizes,
            seconds=options.time, compiled=options.compile,
            peak_flops=options.peak_gflops * 1e9 if options.peak_gflops else None,
            json_file=options.json, plot_file=options.plot,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
