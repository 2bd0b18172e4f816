"""How ``sparse-comm doctor`` prints what it found."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_comm.cli.doctor import Check

__all__ = ["show"]

_STYLES = {"ok": "green", "untested": "yellow", "absent": "dim", "broken": "bold red"}


def show(version: str, platform: str, found: Sequence[Check]) -> None:
    """Print a table, the commands that add or repair, and whether sparse_comm can work."""
    title = f"sparse_comm {version} on {platform}"
    broken = [check for check in found if check.state == "broken"]
    try:
        _print_table(title, found)
    except ImportError:  # no rich, which is among what is broken
        print(title)
        for check in found:
            print(f"  {check.name:16}{check.state:10}{_details(check)}")
    absent = [check for check in found if check.state != "broken" and check.fix]
    _print_commands("Repair first:", broken)
    _print_commands("What is absent is not required. To add it:", absent)
    print(
        f"\nsparse_comm cannot work here: {', '.join(check.name for check in broken)} broken."
        if broken
        else "\nsparse_comm can work here."
    )


def _print_table(title: str, found: Sequence[Check]) -> None:
    from rich.table import Table
    from rich.text import Text

    from sparse_comm.cli.screen import console, put

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for group, checks in groupby(found, key=lambda check: check.group):
        table.add_row(Text(group, "bold"))
        for check in checks:
            state = Text(check.state, _STYLES[check.state])
            table.add_row(f"  {check.name}", state, _details(check))
    out = console()
    out.print(f"{title}\n")
    put(out, table)


def _details(check: Check) -> str:
    return "; ".join(filter(None, (check.value, check.note)))


def _print_commands(title: str, checks: Sequence[Check]) -> None:
    if checks:
        print(f"\n{title}")
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"  {check.name:{width}}  {check.fix}")
