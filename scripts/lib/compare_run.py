"""What comparisons of frameworks share: from a plan to the report of what was measured."""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import Progress

from . import results
from .bench import LOOPBACK, link_name, run_over
from .job import add_bar, progress_bars, run_job, run_script
from .netns import LinkUnavailable, NamespacePair

DENSITY = 0.1  # unpruned parameters over all, those without a mask included

Section = Any  # what a table compares: a ZeRO stage, or a grid of stages and replicas


@dataclass(frozen=True)
class Framework:
    """What the comparison needs to know about a framework."""

    package: str
    name: str
    sections: str  # what its sections are, in the settings
    module: str  # of a rank
    ranks: Callable[[Section], int]
    sides: Callable[[Section], Sequence[str]]
    settings: Callable[[Section], dict]  # of a rank's job
    full: dict[str, int]  # sizes of model and training
    quick: dict[str, int]
    about: Callable[[dict, dict], str]  # how it was measured, from the job and what a rank returned
    report: ModuleType  # title_of, rows_of, verdicts, tables
    draw: Callable[[Sequence, Path], None]
    notes: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """What to compare, and where to write it."""

    sections: Sequence[Section]
    links: Sequence[str]
    size: dict[str, int]  # as Framework.full, and the seed
    out: Path
    name: str  # of the files
    judge_times: bool  # whether the targets of times are for this size

    @property
    def plot(self) -> str:
        return f"{self.name}.png"

    @property
    def written(self) -> str:
        return f"{self.name}.md, {self.name}.json and {self.plot}"


def compare(framework: Framework, plan: Plan) -> int:
    """Measure, and write the report; returns the exit status."""
    notes: list[str] = []
    try:
        return run_script(
            "The comparison",
            plan.out,
            plan.written,
            measure=lambda console: _run_all(framework, plan, notes, console),
            write=lambda rows, origin: _write(framework, plan, rows, notes, origin),
            is_wrong=lambda row: row.wrong,
            complaint="Not the same training",
            packages=(framework.package,),
        )
    except LinkUnavailable as error:
        print(f"{error}; --links {LOOPBACK} works everywhere", file=sys.stderr)
        return 1


def _run_all(framework: Framework, plan: Plan, notes: list[str], console: Console) -> list:
    """All rows; adds to the notes what a reader needs to know about them."""
    links = possible_links(plan.links, notes, console)
    rows: list = []
    counters: dict[str, list[str]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder,
        progress_bars(console) as progress,
    ):
        job: dict = plan.size | {"start": str(Path(folder) / "warm.pt"), "density": DENSITY}
        _warm_up(job, progress)
        for link in links:
            for section in plan.sections:
                title = framework.report.title_of(link, section)
                turns = len(framework.sides(section)) * job["steps"]
                ranks, counted = run_over(
                    link,
                    framework.module,
                    job | framework.settings(section),
                    add_bar(progress, title, turns),
                    framework.ranks(section),
                )
                if not rows:
                    notes.insert(0, framework.about(job, ranks[0]))
                rows += framework.report.rows_of(link, section, ranks)
                counters.setdefault(counted, []).append(title)
    for counted, titles in counters.items():
        notes.append(f"MB sent, {'; '.join(titles)}: {counted}; a step's, mean over blocks.")
    return rows


def possible_links(links: Sequence[str], notes: list[str], console: Console) -> list[str]:
    """Those of the links that this machine can make; LinkUnavailable if it can make none."""
    found = []
    missing: LinkUnavailable | None = None
    for link in links:
        try:
            if link != LOOPBACK:
                with NamespacePair(link):
                    pass
            found.append(link)
        except LinkUnavailable as error:
            missing = error
            notes.append(f"{link_name(link)} was not measured: {error}.")
            console.print(notes[-1], markup=False)
    if missing and not found:
        raise missing
    return found


def _warm_up(job: dict, progress: Progress) -> None:
    """Train the dense model a little, and file it as ``job["start"]``."""
    on_progress = add_bar(progress, "warm-up, one process", job["warm_up"])
    run_job("lib.step_one", job | {"densities": [], "computes": []}, 1, on_progress)


def _write(
    framework: Framework, plan: Plan, rows: Sequence, notes: list[str], origin: dict[str, str]
) -> None:
    judged = framework.report.verdicts(rows, plan.judge_times)
    facts = {
        "settings": plan.size | {"density": DENSITY, framework.sections: list(plan.sections)},
        "notes": notes,
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    parts = [
        f"![what steps consist of]({plan.plot})",
        *framework.report.tables(rows),
        "## Targets",
        "\n".join(f"- {verdict.sentence()}" for verdict in judged),
        "## How to read it",
        "\n".join(f"- {note}" for note in [*notes, *framework.notes]),
    ]
    title = f"One pruned GPT under {framework.name}, dense and compact"
    results.write(plan.out, plan.name, facts, title, parts, origin)
    framework.draw(rows, plan.out / plan.plot)
    for verdict in judged:
        print(verdict.sentence(mark=""))
