"""What the commands print: tables that fit the terminal, a progress bar, numbers for people."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = [
    "Column",
    "SlowBar",
    "bytes_text",
    "console",
    "natural_order",
    "print_table",
    "put",
    "readable",
]

_NO_LIMIT = 10_000  # columns of what is no terminal: a pipe or a file gets whole lines


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # to main(); rich would end with status 1


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        head: its title.
        right: whether it is flush right, as numbers are.
        expendable: 0 if it always stays; of the others the highest goes first where there is too
            little room.
    """

    head: str
    right: bool = False
    expendable: int = 0


def console(stderr: bool = False) -> Console:
    """A console that prints text as it is, in colour only where rich finds that fit (NO_COLOR)."""
    made = _Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = _NO_LIMIT
    return made


def print_table(
    out: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    total: Sequence[str] | None = None,
) -> None:
    """Print a table, without its most expendable columns where the terminal is too narrow.

    Args:
        out: where to.
        columns: the columns, first to last.
        rows: a cell a column.
        total: one more row, under a line, in bold.
    """
    kept = list(range(len(columns)))
    wide = out.options.update(max_width=_NO_LIMIT)
    while True:
        table = Table(
            box=box.SIMPLE,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_footer=total is not None,
        )
        for i in kept:
            foot = total[i] if total is not None else ""
            justify: JustifyMethod = "right" if columns[i].right else "left"
            table.add_column(columns[i].head, foot, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(row[i] for i in kept))
        most = max(kept, key=lambda i: columns[i].expendable)
        if out.measure(table, options=wide).maximum <= out.width or not columns[most].expendable:
            break
        kept.remove(most)
    put(out, table)
    if left_out := [column.head for i, column in enumerate(columns) if i not in kept]:
        out.print(f"(no room for {', '.join(left_out)}: widen the terminal or use --json)")


def put(out: Console, table: Table) -> None:
    """Print a table, in a pipe or file without the blanks that fill its lines."""
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    for line in captured.get().splitlines():
        out.print(line.rstrip())


class SlowBar:
    """Context manager: a progress bar on the standard error for what takes more than two seconds.

    It is there only on a terminal and goes when the work is done.

    Args:
        text: what goes on.
        total: how much there is to do.
    """

    _PATIENCE = 2.0  # seconds

    def __init__(self, text: str, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()
        out = console(stderr=True)
        self._progress = Progress(*columns, TimeRemainingColumn(), console=out, transient=True)
        self._task = self._progress.add_task(text, total=total)
        self._due = time.monotonic() + self._PATIENCE if out.is_terminal else math.inf
        self._shown = False

    def advance(self, amount: int) -> None:
        """Note that ``amount`` more is done."""
        self._progress.advance(self._task, amount)
        if not self._shown and time.monotonic() > self._due:
            self._progress.start()
            self._shown = True

    def __enter__(self) -> SlowBar:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._shown:
            self._progress.stop()


def bytes_text(count: int) -> str:
    """Bytes for people: powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def natural_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, with layers.2 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


def readable(name: str) -> str:
    """The name, or its JSON where it would disturb the terminal: a file may hold any name."""
    return name if name.isprintable() else json.dumps(name)
