"""How commands print: one JSON document, or tables and lines; progress bars on a terminal, plain lines elsewhere."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from cachefs.errors import printable as printable

PLAIN_INTERVAL_S = 2.0
Show = Callable[[dict[str, Any]], None]


def document(value: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(value, indent=2, sort_keys=False, default=str))


def complain(error: Exception) -> None:
    """One line on stderr."""
    click.echo(f"cachefs: {printable(' '.join(str(error).split())) or type(error).__name__}", err=True)


def human_bytes(count: float) -> str:
    """`91.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; numbers to the right. Nothing is cut off, so that scripts and narrow terminals get all."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(column) for column in columns) for columns in zip(headers, *cells, strict=True)]
    right = [bool(rows) and all(isinstance(row[at], (int, float)) for row in rows) for at in range(len(headers))]
    for line in [list(headers), *cells]:
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


@contextlib.contextmanager
def progress(what: str, *, quiet: bool) -> Iterator[Show]:
    """Gives a function that shows `{"done_bytes", "total_bytes", ...}`; nothing at all when `quiet` (--json)."""
    if quiet:
        yield lambda state: None
    elif sys.stderr.isatty():
        with _bar(what) as show:
            yield show
    else:
        yield _plain(what)


def _plain(what: str) -> Show:
    started = last = time.monotonic()

    def show(state: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_S:
            return
        last = now
        done, total = state.get("done_bytes", 0), state.get("total_bytes", 0)
        rate = done / max(now - started, 1e-3)
        click.echo(f"{what}: {human_bytes(done)} of {human_bytes(total)}, {human_bytes(rate)}/s", err=True)

    return show


@contextlib.contextmanager
def _bar(what: str) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(what, total=None, rate="")

        def show(state: dict[str, Any]) -> None:
            bars.update(task, completed=state.get("done_bytes", 0), total=state.get("total_bytes") or None)
            speed = bars.tasks[0].speed
            bars.update(task, rate=f"{human_bytes(speed)}/s" if speed else "")

        yield show
