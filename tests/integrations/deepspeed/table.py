"""The table of combinations in docs/deepspeed.md, from the promises that the tests hold.

python -m tests.integrations.deepspeed.table    writes it into the page
"""

from __future__ import annotations

from pathlib import Path

from . import combinations, parallel
from .rows import STAGES, Refused, Row, Rows

PAGE = Path(__file__).parents[3] / "docs" / "deepspeed.md"
START = "<!-- combinations: python -m tests.integrations.deepspeed.table -->\n"
END = "<!-- end of combinations -->\n"


def table() -> str:
    """In markdown."""
    lines = ["| | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |"]
    lines.append("| --- |" + " :-: |" * len(STAGES))
    for rows in (combinations.ROWS, parallel.PIPELINES, parallel.EXPERTS):
        lines += _lines(rows)
    return "\n".join(lines) + "\n"


def _lines(rows: Rows) -> list[str]:
    return [
        f"| {row.name} | {' | '.join(_cell(row, stage) for stage in STAGES)} |"
        for row in rows.values()
    ]


def _cell(row: Row, stage: int) -> str:
    promise = row.promises[stage]
    if isinstance(promise, Refused):
        return promise.by
    text = "=" if promise == "=" else f"≈ {promise:g}"
    return f"{text} {row.where}".rstrip()


def rewritten(page: str) -> str:
    """The page with the table in its place."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return before + START + "\n" + table() + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
