"""What the command line prints: tables and progress, with rich where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence


def _has_rich() -> bool:
    return importlib.util.find_spec("rich") is not None


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table; in a file or a pipe, and without rich, as aligned plain text."""
    if _has_rich() and sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        view = Table(*headers, title=title or None, title_justify="left")
        for row in rows:
            view.add_row(*row)
        Console().print(view, markup=False)
        return
    if title:
        print(title)
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, ["-" * width for width in widths], *rows):
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    print()


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Yields `step(label)`, to be called before each of `total` pieces of work.

    A bar on a terminal, nothing elsewhere: a log wants the table, not the way to it."""
    if not (_has_rich() and sys.stderr.isatty()):
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.description}", markup=False))  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task, done = bar.add_task("", total=total), 0

        def step(label: str) -> None:
            nonlocal done
            bar.update(task, description=label, completed=done)
            done += 1

        yield step
