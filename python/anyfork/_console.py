"""What the commands print: with rich on a terminal that has it, else plain text.

Rule: results go to stdout, progress to stderr, and only to a terminal.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, Self

_COLOURS = {
    "ok": "green",
    "works": "green",
    "ready": "green",
    "no": "red",
    "FAILED": "bold red",
    "refused": "red",
    "skipped": "yellow",
}


def _rich_console(stream: Any) -> Any:
    """A rich console for this stream, or None."""
    if not stream.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> None:
    """Print a table; columns in ``right`` are aligned to the right, headers may have lines."""
    console = _rich_console(sys.stdout)
    if console is None:
        _plain_table(headers, rows, right)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    grid.collapse_padding, grid.show_edge = True, False
    for i, header in enumerate(headers):
        grid.add_column(header, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell, style=_COLOURS.get(cell.split(" ")[0], "")) for cell in row))
    console.print(grid)


def _plain_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]
) -> None:
    height = max(header.count("\n") for header in headers) + 1
    columns = [[*[""] * height, *header.split("\n")][-height:] for header in headers]
    heads = [[column[i] for column in columns] for i in range(height)]
    widths = [max(len(row[i]) for row in [*heads, *rows]) for i in range(len(headers))]
    for row in [*heads, ["-" * width for width in widths], *rows]:
        cells = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())


def banner(text: str) -> None:
    """Print a line across the terminal that begins with ``text``."""
    width = min(shutil.get_terminal_size().columns, 100) if sys.stdout.isatty() else 79
    line = f"== {text} " + "=" * max(0, width - len(text) - 4)
    console = _rich_console(sys.stdout)
    if console is None:
        print(line, flush=True)
    else:
        console.print(line, style="bold", markup=False)


def field(name: str, value: str, width: int = 10) -> None:
    """Print ``name: value``, coloured where the value begins with a verdict."""
    label = f"  {name}:".ljust(width + 4)
    console = _rich_console(sys.stdout)
    if console is None:
        print(f"{label}{value}", flush=True)
    else:
        from rich.text import Text

        style = _COLOURS.get(value.split(" ")[0].rstrip(",;:"), "")
        console.print(Text(label, style="dim").append(value, style=style or "not dim"),
                      soft_wrap=True)


class Progress:
    """A progress bar over ``total`` steps; nothing where stderr is no terminal.

    Draws when told, never from a thread of its own.
    """

    def __init__(self, total: int) -> None:
        self.total = max(total, 1)
        self.what = ""
        self.done = 0
        self._drawn = 0.0
        self._bar: Any = None
        self._task: Any = None
        self._plain = False

    def __enter__(self) -> Self:
        console = _rich_console(sys.stderr)
        if console is None:
            self._plain = sys.stderr.isatty()
            return self
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=self.total)
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._plain:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def begin(self, what: str, total: int) -> None:
        """Start again from 0, for something else."""
        self.what, self.total, self.done = what, max(total, 1), 0
        if self._bar is not None:
            self._bar.reset(self._task, total=self.total, description=what)
        self._draw()

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        if now - self._drawn > 0.05 or self.done >= self.total:
            self._drawn = now
            self._draw()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, refresh=True)
        elif self._plain:
            full = 30 * self.done // self.total
            print(
                f"\r\x1b[K{self.what:<28} [{'#' * full}{'.' * (30 - full)}] "
                f"{self.done}/{self.total}",
                end="",
                file=sys.stderr,
                flush=True,
            )
