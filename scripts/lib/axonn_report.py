"""Turns what the ranks of ``axonn_rank.py`` measured into tables, and checks the targets."""

import math
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from . import axonn_phases, bench, results
from .axonn_kinds import (
    BUCKETS,
    COLLECTIVE,
    COMPACT,
    COMPACT_AFTER,
    COMPUTE,
    MASKED,
    PHASES,
    RELEASED,
    RELEASED_BF16,
)
from .axonn_phases import Span
from .bench import LOOPBACK, Estimate, link_name
from .step_kinds import CACHED, COMPUTE_BF16, ROUNDING, Phases
from .step_report import FINAL_STEPS, means
from .verdict import Verdict

LIMIT = ROUNDING[COMPUTE_BF16]  # what losses may differ by, in nats
TIME_LINK = "1gbit"  # that the targets of times are for
BYTES_TARGET = 1.02  # times f × dense bf16, at most
COLLECTIVE_TARGET = 9.0  # times as fast as AxoNN's own, with gradients in bf16
EXPOSED_TARGET = 0.10  # of the step, at most
COMPUTE_TARGET = 1.05  # times dense, at most

Grid = tuple[int, int]  # pipeline stages, replicas


@dataclass(frozen=True)
class Row:
    """One side on one grid over one link; losses are means over the replicas."""

    link: str
    grid: Grid
    kind: str
    density: float  # f: unpruned parameters over all
    payload: float  # bytes of gradients that a rank hands over in a step, mean over ranks
    sent: float | None  # bytes that a rank sent in a step, by its interface's counter
    time: Estimate  # s, of a step
    ratio: Estimate  # AxoNN as released over this
    phases: Phases  # s, means over ranks of medians over steps
    under_way: float  # s, in which gradients are being reduced
    last_loss: float
    difference: float  # largest between two losses, against masked dense
    pruned_weights_left: int
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)

    @property
    def section(self) -> tuple[str, Grid]:
        return self.link, self.grid

    @property
    def exposed(self) -> float:
        """Of the step, the part in which it waits for its collectives."""
        return self.phases[COLLECTIVE] / self.time.value

    @property
    def wrong(self) -> bool:
        """Whether it is not the training that it should be."""
        if not all(math.isfinite(loss) for loss in self.losses):
            return True
        if self.kind not in (MASKED, *COMPACT):  # their pruned weights grow back
            return False
        return not self.difference <= LIMIT or self.pruned_weights_left > 0


def grid(text: str) -> Grid:
    """Of an argument such as 2x1: stages, replicas."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no grid: give stages x replicas, such as 2x1")
    sizes = int(found[1]), int(found[2])
    if sizes[0] * sizes[1] % 2:
        raise ArgumentTypeError(
            f"{text!r} has an odd number of ranks: half of them are on each side of the link"
        )
    return sizes


def grid_name(grid: Grid) -> str:
    stages, replicas = grid
    return f"{stages} × {replicas}"


def title_of(link: str, grid: Grid) -> str:
    return f"{link_name(link)}, {grid_name(grid)}"


def rows_of(link: str, grid: Grid, ranks: Sequence[dict]) -> list[Row]:
    """The rows of one grid over one link, from what its ranks returned."""
    sharing = len(ranks) if link == LOOPBACK else len(ranks) // 2  # ranks that share a counter
    sides = list(zip(*(rank["sides"] for rank in ranks), strict=True))
    last = [at for at, rank in enumerate(ranks) if rank["stage"] == grid[0] - 1]
    seconds = {own[0]["kind"]: _slowest(own) for own in sides}
    losses = {own[0]["kind"]: means(own[at]["losses"] for at in last) for own in sides}
    rows = []
    for own in sides:
        kind = own[0]["kind"]
        of_ranks = _phases(ranks, own)
        found = {name: fmean(phases[name] for phases in of_ranks) for name in PHASES}
        under_way = [facts["wire_s"] for facts in own]
        counted = means(facts["bytes"] for facts in own)
        rows.append(
            Row(
                link,
                grid,
                kind,
                ranks[0]["unpruned"] / ranks[0]["parameters"],
                fmean(facts["payload"] for facts in own),
                fmean(counted) / sharing if counted else None,
                bench.median(seconds[kind]),
                bench.ratio(seconds[RELEASED], seconds[kind]),
                found,
                # AxoNN's own waits for each: what is under way is what is waited for
                found[COLLECTIVE] if None in under_way else fmean(under_way),
                fmean(losses[kind][-FINAL_STEPS:]),
                max(abs(a - b) for a, b in zip(losses[kind], losses[MASKED], strict=True)),
                sum(facts["pruned_weights_left"] for facts in own),
                losses[kind],
                seconds[kind],
            )
        )
    return rows


def _slowest(sides: Sequence[dict]) -> list[float]:
    """Seconds of each step, of its slowest rank."""
    return [max(step) for step in zip(*(facts["seconds"] for facts in sides), strict=True)]


def _phases(ranks: Sequence[dict], sides: Sequence[dict]) -> list[Phases]:
    """Of each rank, medians over the timed steps."""
    at = {(rank["replica"], rank["stage"]): n for n, rank in enumerate(ranks)}
    spans = [[[Span(*span) for span in step] for step in facts["spans"]] for facts in sides]
    found = []
    for number, rank in enumerate(ranks):
        of_steps = []
        for step, own in enumerate(spans[number]):
            arriving = {}
            for kind, side in (("axonn.forward", -1), ("axonn.backward", 1)):
                neighbour = at.get((rank["replica"], rank["stage"] + side))
                if neighbour is not None:
                    arriving[kind] = axonn_phases.sends(spans[neighbour][step], kind)
            of_steps.append(axonn_phases.phases(own, arriving))
        found.append({name: median(phases[name] for phases in of_steps) for name in PHASES})
    return found


def sections(rows: Sequence[Row]) -> list[tuple[str, Grid]]:
    return list(dict.fromkeys(row.section for row in rows))


# --- targets -------------------------------------------------------------------------------------


def verdicts(rows: Sequence[Row], judge_times: bool) -> list[Verdict]:
    """The targets of what was measured, those of times only if they are for this model."""
    judged = []
    for link, grid in sections(rows):
        where = title_of(link, grid)
        found = {row.kind: row for row in rows if row.section == (link, grid)}
        if grid[1] > 1:
            judged += _of_collectives(where, found, judge_times and link == TIME_LINK, grid)
        difference = max(found[kind].difference for kind in COMPACT)
        text = "largest difference between compact training's losses and masked dense training's"
        judged.append(Verdict(where, text, f"{difference:.1e}", "0", difference == 0))
    return judged


def _of_collectives(
    where: str, found: dict[str, Row], judge_times: bool, grid: Grid
) -> list[Verdict]:
    dense, compact = found[BUCKETS], found[CACHED]
    counted = grid[0] == 1 and dense.sent and compact.sent  # else messages of stages count, too
    share = compact.sent / dense.sent if counted else compact.payload / dense.payload  # type: ignore[operator]
    most = BYTES_TARGET * compact.density
    text = "bytes sent" if counted else "bytes of gradients"
    judged = [
        Verdict(
            where,
            f"compact's {text} over those of dense in bf16",
            f"{share:.4f}",
            f"at most {BYTES_TARGET} × f = {most:.4f}",
            share <= most,
        )
    ]
    if not judge_times:
        return judged
    apart = found[COMPACT_AFTER]
    faster = found[RELEASED_BF16].under_way / apart.under_way
    computing = compact.phases[COMPUTE] / dense.phases[COMPUTE]
    texts = (
        (
            f"time of the collectives, {RELEASED_BF16} over {apart.kind}",
            f"{faster:.1f}",
            f"at least {COLLECTIVE_TARGET:g}",
            faster >= COLLECTIVE_TARGET,
        ),
        (
            f"what {compact.kind} waits for collectives, of the step",
            f"{compact.exposed:.1%}",
            f"at most {EXPOSED_TARGET:.0%}",
            compact.exposed <= EXPOSED_TARGET,
        ),
        (
            f"compute time of {compact.kind} over that of {dense.kind}",
            f"{computing:.3f}",
            f"at most {COMPUTE_TARGET:g}",
            computing <= COMPUTE_TARGET,
        ),
    )
    return judged + [Verdict(where, *text) for text in texts]


# --- as text -------------------------------------------------------------------------------------

HEAD = (
    "side",
    "MB of gradients",
    "MB sent",
    "step, ms",
    "as released / this",
    *PHASES,
    "collectives under way",
    "last losses",
    "largest \\|Δloss\\|",
)


def cells(row: Row) -> list[str]:
    return [
        f"**{row.kind}**" if row.kind == CACHED else row.kind,
        f"{row.payload / 1e6:.2f}",
        "–" if row.sent is None else f"{row.sent / 1e6:.2f}",
        row.time.text(0, scale=1e-3),
        row.ratio.text(2),
        *(f"{row.phases[name] * 1e3:.1f}" for name in PHASES),
        f"{row.under_way * 1e3:.1f}",
        f"{row.last_loss:.4f}",
        f"{row.difference:.1e}",
    ]


def tables(rows: Sequence[Row]) -> list[str]:
    """A heading and a table for each grid over each link."""
    parts = []
    for link, grid in sections(rows):
        stages, replicas = grid
        parts.append(f"## {link_name(link)}, G_inter {stages} × G_data {replicas}")
        of_this = [cells(row) for row in rows if row.section == (link, grid)]
        parts.append(results.markdown_table(HEAD, of_this))
    return parts
