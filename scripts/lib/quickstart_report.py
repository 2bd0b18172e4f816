"""Turns what the quickstart's ranks measured into one table, as markdown and as JSON."""

from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from rich.table import Table
from scipy.stats import bootstrap

from . import results
from .settings import Settings

SIDES = ("dense", "compact")
TIMES = {
    "communication": "communication time",
    "exposed": "exposed communication time",
    "step": "step time",
}
# How the ranks' times of one step become one. A rank that is ready early also waits for its peer;
# the one that is ready last waits for the network alone. A step is over when both are done.
OVER_RANKS = {"communication": min, "exposed": min, "step": max}
FINAL_STEPS = 10  # the training loss at the end is the mean of that many
SCALE = {"ms": 1e-3, "MB": 1e6, "nats": 1.0}  # what a printed unit is, in seconds, bytes, nats
DIGITS = {"ms": 1, "MB": 2, "nats": 4}


@dataclass
class Row:
    """A quantity of both sides; ``low`` and ``high`` are the 95 % interval of the ratio."""

    link: str  # empty for what does not depend on it
    quantity: str
    unit: str  # the values are in seconds, bytes or nats; this is the unit to print
    dense: float
    compact: float
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float:
        return self.dense / self.compact


@dataclass
class StageResult:
    """What the ranks of one stage filed: see ``quickstart_rank.main``."""

    name: str
    ranks: list[dict]
    counted: str  # in words: whose counter the bytes on the wire are
    ranks_per_counter: int

    def losses(self, side: str) -> list[float]:
        """Training loss of each step, mean over the ranks."""
        return self._over_ranks(fmean, side, "losses")

    def times(self, side: str, what: str) -> list[float]:
        """Seconds of each timed step."""
        parts = [[step[what] for step in rank["sides"][side]["timings"]] for rank in self.ranks]
        return [OVER_RANKS[what](values) for values in zip(*parts, strict=True)]

    def wire_bytes(self, side: str) -> list[float]:
        """Bytes that a rank sent in a step, one number a block; none where lo is unreadable."""
        counts = self._over_ranks(fmean, side, "wire bytes")
        return [count / self.ranks_per_counter for count in counts]

    def state_bytes(self, side: str) -> float:
        """Bytes of model state, mean over the ranks."""
        return fmean(sum(rank["sides"][side]["state bytes"].values()) for rank in self.ranks)

    def validation(self, when: str) -> float:
        return fmean(rank["validation"][when] for rank in self.ranks)

    def warm_up_losses(self) -> list[float]:
        parts = [rank["warm-up losses"] for rank in self.ranks]
        return [fmean(values) for values in zip(*parts, strict=True)]

    def largest_loss_difference(self) -> float:
        """How far the two trainings' losses are apart, at most."""
        both = zip(self.losses("dense"), self.losses("compact"), strict=True)
        return max(abs(dense - compact) for dense, compact in both)

    def _over_ranks(self, combine, side: str, what: str) -> list[float]:
        parts = [rank["sides"][side][what] for rank in self.ranks]
        return [combine(values) for values in zip(*parts, strict=True)]


def table_rows(stages: list[StageResult]) -> list[Row]:
    """The rows of the table; the first stage gives what does not depend on the link."""
    rows = []
    for stage in stages:
        for what, label in TIMES.items():
            dense, compact = (stage.times(side, what) for side in SIDES)
            interval = ratio_interval(dense, compact)
            rows.append(Row(stage.name, label, "ms", median(dense), median(compact), *interval))
        sent = [stage.wire_bytes(side) for side in SIDES]
        if all(sent):
            rows.append(Row(stage.name, "bytes on the wire", "MB", *map(median, sent)))
    first = stages[0]
    state = [first.state_bytes(side) for side in SIDES]
    last_losses = [fmean(first.losses(side)[-FINAL_STEPS:]) for side in SIDES]
    validation = [first.validation(side) for side in SIDES]
    rows.append(Row("", "bytes of model state", "MB", *state))
    rows.append(Row("", f"training loss (last {FINAL_STEPS})", "nats", *last_losses))
    rows.append(Row("", "final validation loss", "nats", *validation))
    return rows


def _wire_note(stage: StageResult, density: float) -> str:
    """Whose bytes they are, and how close they come to density × dense."""
    text = f"Bytes on the wire, {stage.name}, per rank and step: {stage.counted}."
    dense, compact = (stage.wire_bytes(side) for side in SIDES)
    if not dense or not compact:
        return text
    sent = median(compact) / median(dense)
    return (
        f"{text} Compact sends {sent:.4f} of dense, which is {sent / density:.3f} of the density "
        f"f = {density:.4f} (unpruned parameters over all, unmasked ones included)."
    )


def ratio_interval(dense: list[float], compact: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the ratio of medians."""

    def ratio_of_medians(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(a, axis=axis) / np.median(b, axis=axis)

    interval = bootstrap(
        (dense, compact),
        ratio_of_medians,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def notes(stages: list[StageResult], settings: Settings, why_no_link: str | None) -> list[str]:
    """What a reader needs to judge the table."""
    first, rank = stages[0], stages[0].ranks[0]
    parameters, pruned = rank["parameters"], rank["pruned"]
    loss_difference = max(stage.largest_loss_difference() for stage in stages)
    weight_difference = max(r["largest weight difference"] for stage in stages for r in stage.ranks)
    lines = [
        f"Two processes (gloo, one thread each) train a GPT of {parameters / 1e6:.1f}M parameters, "
        f"of which {pruned / parameters:.1%} are pruned; fp32 on both sides (but for gradients on "
        "the wire, where a row says bf16: then those of both sides), the same seed, data, "
        f"AdamW (fused) and DDP settings; {settings.batch} sequences of {settings.context} bytes "
        "per rank and step. The dense side multiplies its weights by fp32 masks after each step; "
        f'the compact side keeps `weights="{settings.weights}"`.',
        f"Validation loss: {first.validation('after the warm-up'):.3f} after {settings.warmup} "
        f"dense steps, {first.validation('just pruned'):.3f} just pruned, "
        f"{first.validation('compact'):.3f} after {settings.steps} steps with the pruned weights "
        "held at zero.",
        "The two trainings are one and the same up to rounding: their losses differ by at most "
        f"{loss_difference:.1e} at any step, their final weights by at most "
        f"{weight_difference:.1e}. (Fused AdamW may round the last few entries of a tensor "
        "differently, and a compact tensor ends elsewhere.) Checked: every pruned weight is "
        "exactly 0 in both.",
        "Times are medians of the timed steps, ratios come with a 95 % bootstrap interval. Dense "
        "and compact take turns in one pair of processes, so that other work on the machine "
        "disturbs both alike.",
        "Communication time: how long at least one bucket of gradients was under way, from its "
        "hand-over to DDP's communication hook to the end of its all-reduce. Exposed "
        "communication time: from the hand-over of the last bucket, when every gradient is "
        "ready, to the end of `backward()`, DDP's own finishing included. Of the two ranks the "
        "one with the lesser time counts, so that waiting for a slower peer is not taken for "
        "communication; the step time is that of the slower rank.",
        "gloo's threads share the cores with the computation, so hidden communication is not "
        "free: it slows the backward pass, which shows in the step time only.",
        *(_wire_note(stage, 1 - pruned / parameters) for stage in stages),
        "Model state, per rank: parameters, gradients, optimizer state, sparsity pattern and "
        "cached dense weights, counted from the live tensors. The dense side's masks are not "
        "counted.",
    ]
    if why_no_link:
        lines.append(f"There was no run over a slow link: {why_no_link}.")
    return lines


def rich_table(rows: list[Row]) -> Table:
    """The table for the terminal."""
    table = Table(title="Per rank; times and bytes on the wire: medians per step")
    table.add_column("", overflow="fold")
    for heading in (*SIDES, "dense / compact"):
        table.add_column(heading, justify="right", no_wrap=True)
    link = None
    for row in rows:
        if row.link != link:
            link = row.link
            table.add_section()
            table.add_row(f"[bold]{link or 'on any link'}[/bold]")
        table.add_row(*_cells(row))
    return table


def markdown(rows: list[Row], notes: list[str], plot: str) -> list[str]:
    """The parts of the report: table, plot and what is needed to read them."""
    head = ("link", "per rank and step", *SIDES, "dense / compact")
    table = results.markdown_table(head, [[row.link or "any", *_cells(row)] for row in rows], 2)
    readings = "\n".join(f"- {note}" for note in notes)
    return [table, f"![loss curves, bytes and times]({plot})", f"## How to read it\n\n{readings}"]


def _cells(row: Row) -> list[str]:
    ratio = f"{row.ratio:.2f}"
    if row.low is not None:
        ratio += f" ({row.low:.2f}–{row.high:.2f})"
    sides = (row.dense, row.compact)
    values = [f"{value / SCALE[row.unit]:.{DIGITS[row.unit]}f} {row.unit}" for value in sides]
    return [row.quantity, *values, ratio]
