"""Writes a script's results: one JSON and one markdown file with what is needed to repeat it."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .machine import provenance

FOLDER = Path(__file__).resolve().parents[2] / "results"  # of the checkout, wherever it is run from
PACKAGES = ("torch", "numpy", "sparse-comm")


def origin(packages: Sequence[str] = ()) -> dict[str, str]:
    """Command, machine, versions (also of ``packages``), date, commit; call it before measuring."""
    return provenance(command_line(), (*PACKAGES, *packages))


def command_line() -> str:
    """The command to repeat this run, without --out: results hold no paths."""
    arguments = iter(sys.argv[1:])
    kept = []
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif not argument.startswith("--out="):
            kept.append(argument)
    return " ".join([f"python scripts/{Path(sys.argv[0]).name}", *kept])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table whose first ``texts`` columns are text and whose others are right-aligned."""
    rule = ["---" if column < texts else "--:" for column in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def write(out: Path, name: str, facts: dict, title: str, parts: list[str], origin: dict) -> None:
    """Write ``name.json`` (facts) and ``name.md`` (title and parts), both with their origin."""
    out.mkdir(parents=True, exist_ok=True)
    measured = {"provenance": origin, **facts}
    (out / f"{name}.json").write_text(json.dumps(measured, indent=1) + "\n")
    source = "\n".join(f"- {key}: {value}" for key, value in origin.items())
    text = "\n\n".join([f"# {title}", *parts, "## Where it comes from", source])
    (out / f"{name}.md").write_text(text + "\n")
