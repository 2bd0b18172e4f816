"""Turns what the jobs of ``bench_step.py`` measured into tables, and checks the targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from . import bench, results
from .bench import LOOPBACK, Estimate, link_name
from .step_kinds import (
    CACHED,
    DENSE_BF16,
    DENSE_BF16_TUNED,
    DENSE_FP32,
    OURS,
    POWERSGD,
    ROUNDING,
    TRANSIENT,
    Phases,
)
from .verdict import Verdict

FINAL_STEPS = 10  # the training loss at the end is the mean of that many
TUNED = (DENSE_BF16, DENSE_BF16_TUNED)  # ratios are against the faster
PHASES = ("forward", "backward", "exposed", "optimizer")  # the last with "mask"

Section = tuple[str, float, str]  # link, density, what is computed in


@dataclass(frozen=True)
class Row:
    """One training over one link; losses are means over the ranks."""

    link: str
    density: float
    compute: str
    kind: str
    bucket_mb: float | None
    payload: int  # bytes of gradients that a rank has to send in a step
    sent: float | None  # bytes that a rank did send, by its interface's counter
    time: Estimate  # s, of a step
    ratio: Estimate  # the better dense bf16 over this
    phases: Phases  # s, medians
    last_loss: float
    held_out: float
    difference: float  # largest between two losses, against dense of the same precision
    pruned_weights_left: int
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)

    @property
    def section(self) -> Section:
        """What its table and panel hold."""
        return self.link, self.density, self.compute

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding may tell its losses from the dense ones."""
        return self.kind != POWERSGD

    @property
    def wrong(self) -> bool:
        """Whether it is not the training that it should be."""
        finite = all(math.isfinite(loss) for loss in [*self.losses, self.held_out])
        same = self.difference <= ROUNDING[self.compute] or not self.exact
        return not finite or not same or self.pruned_weights_left > 0


def title_of(section: Section) -> str:
    link, density, compute = section
    return f"{link_name(link)}, f = {density:g}, computing in {compute}"


def rows_of(section: Section, ranks: Sequence[dict]) -> list[Row]:
    """The rows of one section, from what its ranks returned."""
    link, *_ = section
    share = len(ranks) if link == LOOPBACK else 1  # of a counter that ranks share
    peers = list(zip(*(rank["peers"] for rank in ranks), strict=True))
    seconds = {both[0]["kind"]: slower_steps(both) for both in peers}
    losses = {both[0]["kind"]: means(facts["losses"] for facts in both) for both in peers}
    baseline = min(TUNED, key=lambda kind: median(seconds[kind]))
    rows = []
    for both in peers:
        kind = both[0]["kind"]
        reference = losses[reference_of(kind)]
        sent = means(facts["bytes"] for facts in both)
        rows.append(
            Row(
                *section,
                kind,
                both[0]["bucket_mb"],
                both[0]["payload"],
                fmean(sent) / share if sent else None,
                bench.median(seconds[kind]),
                bench.ratio(seconds[baseline], seconds[kind]),
                _phases(both),
                fmean(losses[kind][-FINAL_STEPS:]),
                fmean(facts["held_out"] for facts in both),
                max(abs(a - b) for a, b in zip(losses[kind], reference, strict=True)),
                max(facts["pruned_weights_left"] for facts in both),
                losses[kind],
                seconds[kind],
            )
        )
    return rows


def sections(rows: Sequence[Row]) -> list[Section]:
    return list(dict.fromkeys(row.section for row in rows))


def reference_of(kind: str) -> str:
    """Dense training whose gradients travel in the same precision."""
    return DENSE_BF16 if "bf16" in kind else DENSE_FP32


def means(parts) -> list[float]:
    return [fmean(each) for each in zip(*parts, strict=True)]


def slower_steps(ranks: Sequence[dict]) -> list[float]:
    """Seconds of each timed step, of the slower rank."""
    steps = zip(*(facts["phases"] for facts in ranks), strict=True)
    return [max(sum(phases.values()) for phases in step) for step in steps]


def _phases(ranks: Sequence[dict]) -> Phases:
    """Medians over the steps, of the rank that had its gradients last: the other waits for it."""
    steps = zip(*(facts["phases"] for facts in ranks), strict=True)
    last = [min(step, key=lambda phases: phases["exposed"]) for step in steps]
    with_mask = [phases | {"optimizer": phases["optimizer"] + phases["mask"]} for phases in last]
    return {name: median(phases[name] for phases in with_mask) for name in PHASES}


@dataclass(frozen=True)
class Cost:
    """One way to train on one process, and its time over that of masked dense training."""

    density: float
    compute: str
    kind: str
    times: dict[str, float]  # s, medians: phases, "pack", "expand"
    forward_backward: Estimate  # s
    step: Estimate  # s
    forward_backward_ratio: Estimate  # this over dense
    step_ratio: Estimate  # this over masked dense
    unmasked_ratio: Estimate  # this over dense without the multiplication by masks
    difference: float  # largest between two losses
    pruned_weights_left: int

    @property
    def wrong(self) -> bool:
        return not self.difference <= ROUNDING[self.compute] or self.pruned_weights_left > 0


def costs_of(section: dict) -> list[Cost]:
    """The rows of one density on one process; the first side is masked dense."""
    dense, *_ = section["sides"]
    compute, step = ("forward", "backward", "exposed"), (*PHASES, "mask")
    rows = []
    for side in section["sides"]:
        names = side["phases"][0]
        rows.append(
            Cost(
                section["density"],
                section["compute"],
                side["kind"],
                {name: median(phases[name] for phases in side["phases"]) for name in names},
                bench.median(_sums(side, compute)),
                bench.median(_sums(side, step)),
                bench.ratio(_sums(side, compute), _sums(dense, compute)),
                bench.ratio(_sums(side, step), _sums(dense, step)),
                bench.ratio(_sums(side, step), _sums(dense, PHASES)),
                max(abs(a - b) for a, b in zip(side["losses"], dense["losses"], strict=True)),
                side["pruned_weights_left"],
            )
        )
    return rows


def _sums(side: dict, names: Sequence[str]) -> list[float]:
    return [sum(phases[name] for name in names) for phases in side["phases"]]


# --- targets -------------------------------------------------------------------------------------


STEP_TARGET = 4.5  # times as fast as bf16 DDP at 1 Gbit/s, f = 0.1
COST_TARGETS = {CACHED: 0.03, TRANSIENT: 0.08}


def verdicts(rows: Sequence[Row], costs: Sequence[Cost]) -> list[Verdict]:
    """The targets of what was measured."""
    judged = []
    for row in rows:
        if (row.link, row.density, row.kind) == ("1gbit", 0.1, OURS):
            where, limit = title_of(row.section), ROUNDING[row.compute]
            got, wanted = row.ratio.text(2), f"≥ {STEP_TARGET:g}×"
            text = f"{OURS}, whole step against the better dense bf16"
            judged.append(Verdict(where, text, got, wanted, row.ratio.value >= STEP_TARGET))
            text = f"{OURS}, largest difference of losses from dense bf16"
            got, wanted = f"{row.difference:.1e}", f"≤ {limit:g} nats"
            judged.append(Verdict(where, text, got, wanted, row.difference <= limit))
    for cost in costs:
        if most := COST_TARGETS.get(cost.kind):
            for what, ratio in (
                ("forward and backward", cost.forward_backward_ratio),
                ("whole step, dense without masks", cost.unmasked_ratio),
                ("whole step", cost.step_ratio),
            ):
                where = f"one process, f = {cost.density:g}, computing in {cost.compute}"
                text = f"{cost.kind}, adds to {what}"
                got, wanted = percent(ratio), f"≤ {most:.0%}"
                judged.append(Verdict(where, text, got, wanted, ratio.value <= 1 + most))
    return judged


def limits(rows: Sequence[Row]) -> list[str]:
    """For each section, how fast dense training would be if it waited for nothing."""
    notes = []
    for section in sections(rows):
        dense = (row for row in rows if row.section == section and row.kind in TUNED)
        baseline = min(dense, key=lambda row: row.time.value)
        computing = sum(baseline.phases[name] for name in PHASES if name != "exposed")
        notes.append(
            f"{title_of(section)}: {baseline.kind} computes for "
            f"{computing * 1e3:.0f} ms a step. Were communication free, it would be "
            f"{baseline.time.value / computing:.2f} times as fast; a smaller optimizer step and no "
            "threads of gloo on the same cores are what ours can gain beyond that."
        )
    return notes


def percent(ratio: Estimate) -> str:
    """A ratio as what it adds to 1."""
    value, low, high = (f"{100 * (x - 1):+.1f}" for x in (ratio.value, ratio.low, ratio.high))
    return f"{value} % ({low} to {high})"


# --- as text -------------------------------------------------------------------------------------

TARGET_HEAD = ("where", "target", "measured", "wanted", "")
HEAD = (
    "trained by",
    "bucket, MiB",
    "MB by the formula",
    "MB counted",
    "step, ms",
    "dense bf16 / this",
    *("forward", "backward", "exposed", "optimizer and masks"),
    "last losses",
    "held-out loss",
    "largest \\|Δloss\\|",
)
COST_HEAD = (
    "one process",
    "f",
    "computing in",
    "forward and backward, ms",
    "adds",
    "step, ms",
    "adds",
    "adds to dense without masks",
    *("optimizer", "masks", "pack", "expand"),
    "largest \\|Δloss\\|",
)


def cells(row: Row) -> list[str]:
    return [
        f"**{row.kind}**" if row.kind == OURS else row.kind,
        "–" if row.bucket_mb is None else f"{row.bucket_mb:.3g}",
        f"{row.payload / 1e6:.2f}",
        "–" if row.sent is None else f"{row.sent / 1e6:.2f}",
        row.time.text(0, scale=1e-3),
        row.ratio.text(2),
        *(f"{row.phases[name] * 1e3:.1f}" for name in PHASES),
        f"{row.last_loss:.4f}",
        f"{row.held_out:.4f}",
        f"{row.difference:.1e}",
    ]


def cost_cells(cost: Cost) -> list[str]:
    return [
        cost.kind,
        f"{cost.density:g}",
        cost.compute,
        cost.forward_backward.text(0, scale=1e-3),
        percent(cost.forward_backward_ratio),
        cost.step.text(0, scale=1e-3),
        percent(cost.step_ratio),
        percent(cost.unmasked_ratio),
        *(f"{cost.times[name] * 1e3:.1f}" for name in ("optimizer", "mask", "pack", "expand")),
        f"{cost.difference:.1e}",
    ]


def verdict_cells(verdict: Verdict) -> list[str]:
    reached = "reached" if verdict.reached else "**missed**"
    return [verdict.where, verdict.text, verdict.got, verdict.wanted, reached]


def markdown(
    rows: Sequence[Row], costs: Sequence[Cost], plot: str, notes: Sequence[str]
) -> list[str]:
    """The parts of the report."""
    judged = [verdict_cells(verdict) for verdict in verdicts(rows, costs)]
    parts = [
        f"![losses and times of all]({plot})",
        "## Targets",
        results.markdown_table(TARGET_HEAD, judged, texts=2),
    ]
    for section in sections(rows):
        parts.append(f"## {title_of(section)}")
        of_this = [cells(row) for row in rows if row.section == section]
        parts.append(results.markdown_table(HEAD, of_this))
    parts.append("## What compaction costs where nothing is sent")
    parts.append(results.markdown_table(COST_HEAD, [cost_cells(cost) for cost in costs]))
    return [*parts, "## How to read it", "\n".join(f"- {note}" for note in notes)]
