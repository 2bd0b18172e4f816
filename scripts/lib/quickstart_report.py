"""Turns what the quickstart's ranks measured into one table, as markdown and as JSON."""

from dataclasses import asdict, dataclass
from statistics import fmean, median

import numpy as np
from rich.table import Table
from scipy.stats import bootstrap

from .settings import Settings

SIDES = ("dense", "compact")
TIMES = {
    "communication": "communication time",
    "exposed": "exposed communication time",
    "step": "step time",
}
MEGABYTE = 1e6
MILLISECOND = 1e-3
FINAL_STEPS = 10  # the final training loss is the mean of that many


@dataclass
class Row:
    """A quantity of both sides; ``low`` and ``high`` are the 95 % interval of the ratio."""

    link: str
    quantity: str
    unit: str
    dense: float
    compact: float
    ratio: float
    low: float | None = None
    high: float | None = None


@dataclass
class Measured:
    """One stage's measurements of one side, averaged over the ranks."""

    losses: list[float]  # one a step
    times: dict[str, list[float]]  # seconds, one a timed step
    wire_bytes: list[float]  # bytes that a rank sent a step, one a block
    state_bytes: dict[str, float]

    @staticmethod
    def of(side: str, ranks: list[dict], ranks_per_counter: int) -> "Measured":
        parts = [rank["sides"][side] for rank in ranks]
        timings = list(zip(*(part["timings"] for part in parts), strict=True))
        sent = _means([part["wire bytes"] for part in parts])
        return Measured(
            losses=_means([part["losses"] for part in parts]),
            times={key: [fmean(t[key] for t in step) for step in timings] for key in TIMES},
            wire_bytes=[count / ranks_per_counter for count in sent],
            state_bytes={
                key: fmean(part["state bytes"][key] for part in parts)
                for key in parts[0]["state bytes"]
            },
        )


@dataclass
class LinkResult:
    """One stage: both sides over one link."""

    name: str
    dense: Measured
    compact: Measured
    counted: str  # whose counter the bytes on the wire are

    @staticmethod
    def of(name: str, ranks: list[dict], counted: str, ranks_per_counter: int) -> "LinkResult":
        """``ranks_per_counter``: how many ranks' bytes the interface's counter holds."""
        dense, compact = (Measured.of(side, ranks, ranks_per_counter) for side in SIDES)
        return LinkResult(name, dense, compact, counted)


def table_rows(links: list[LinkResult], ranks: list[dict]) -> list[Row]:
    """The rows of the table; ``ranks`` are the results of the stage that trained longest."""
    rows = []
    for link in links:
        for key, label in TIMES.items():
            dense, compact = link.dense.times[key], link.compact.times[key]
            low, high = ratio_interval(dense, compact)
            rows.append(_row(link.name, label, "ms", median(dense), median(compact), low, high))
        if link.dense.wire_bytes and link.compact.wire_bytes:
            sent = [median(side.wire_bytes) for side in (link.dense, link.compact)]
            rows.append(_row(link.name, "bytes on the wire", "MB", *sent))
    state = [sum(side.state_bytes.values()) for side in (links[0].dense, links[0].compact)]
    rows.append(_row("", "bytes of model state", "MB", *state))
    final = [fmean(side.losses[-FINAL_STEPS:]) for side in (links[0].dense, links[0].compact)]
    rows.append(_row("", f"training loss, mean of the last {FINAL_STEPS} steps", "nats", *final))
    held_out = [fmean(rank["validation"][side] for rank in ranks) for side in SIDES]
    rows.append(_row("", "final validation loss", "nats", *held_out))
    return rows


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
        rng=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def largest_loss_difference(links: list[LinkResult]) -> float:
    """Over all steps of all stages: how far the two trainings' losses are apart."""
    return max(
        abs(dense - compact)
        for link in links
        for dense, compact in zip(link.dense.losses, link.compact.losses, strict=True)
    )


def warm_up_losses(ranks: list[dict]) -> list[float]:
    """The dense warm-up's losses, one a step."""
    return _means([rank["warm-up losses"] for rank in ranks])


def notes(
    links: list[LinkResult], ranks: list[dict], settings: Settings, why_no_link: str | None
) -> list[str]:
    """What a reader needs to judge the table."""
    parameters, pruned = ranks[0]["parameters"], ranks[0]["pruned"]
    validation = {
        name: fmean(r["validation"][name] for r in ranks) for name in ranks[0]["validation"]
    }
    difference = max(rank["largest weight difference"] for rank in ranks)
    lines = [
        f"Two processes (gloo, one thread each) train a GPT of {parameters / 1e6:.1f}M parameters, "
        f"of which {pruned / parameters:.1%} are pruned; fp32 on both sides, the same seed, data, "
        f"AdamW (fused) and DDP settings; {settings.batch} sequences of {settings.context} bytes "
        "per rank and step. The dense side multiplies its weights by fp32 masks after each step.",
        f"Validation loss: {validation['after the warm-up']:.3f} after {settings.warmup} dense "
        f"steps, {validation['just pruned']:.3f} just pruned, {validation['compact']:.3f} after "
        f"{settings.steps} steps with the pruned weights held at zero.",
        "The two trainings are the same one: their training losses differ by at most "
        f"{largest_loss_difference(links):.1e} at any step, their final weights by at most "
        f"{difference:.1e}. All pruned weights are exactly 0 in both.",
        "Times are measured by rank, averaged over the ranks, and given as medians of the timed "
        "steps with a 95 % bootstrap interval of the ratio. Dense and compact take turns in one "
        "pair of processes, so that other work on the machine disturbs both alike.",
        "Communication time: how long at least one bucket of gradients was under way, from its "
        "hand-over to DDP's communication hook to the end of its all-reduce. Exposed "
        "communication time: from the hand-over of the last bucket, when every gradient is "
        "ready, to the end of `backward()`; the step waits that long for nothing else.",
        "gloo's threads share the cores with the computation, so hidden communication is not "
        "free: it slows the backward pass, which shows in the step time only.",
        *(f"Bytes on the wire, {link.name}: {link.counted}; per rank and step." for link in links),
        "Model state: parameters, gradients, optimizer state, sparsity pattern and cached dense "
        "weights, counted from the live tensors. The dense side's masks are not counted.",
    ]
    if why_no_link:
        lines.append(f"There was no run over a slow link: {why_no_link}.")
    return lines


def rich_table(rows: list[Row]) -> Table:
    table = Table(title="Dense and compact, per rank; times and wire bytes are medians per step")
    table.add_column("link")
    table.add_column("quantity")
    for heading in (*SIDES, "dense / compact"):
        table.add_column(heading, justify="right")
    previous = None
    for row in rows:
        if previous is not None and row.link != previous:
            table.add_section()
        table.add_row(row.link if row.link != previous else "", *_cells(row))
        previous = row.link
    return table


def markdown(rows: list[Row], notes: list[str], provenance: dict[str, str]) -> str:
    """The table with what is needed to read and to repeat it."""
    lines = [
        "# Quickstart: the same pruned training, dense and compact",
        "",
        "| link | quantity | dense | compact | dense / compact |",
        "|---|---|--:|--:|--:|",
    ]
    lines += [f"| {' | '.join([row.link or 'any', *_cells(row)])} |" for row in rows]
    lines += ["", "![loss curves, bytes and times](plot.png)", "", "## How to read it", ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", "## Where it comes from", ""]
    lines += [f"- {key}: {value}" for key, value in provenance.items()]
    return "\n".join(lines) + "\n"


def as_json(
    rows: list[Row], links: list[LinkResult], further: dict, provenance: dict[str, str]
) -> dict:
    """Everything that was measured, step by step."""
    return {
        "provenance": provenance,
        "table": [asdict(row) for row in rows],
        **further,
        "links": [asdict(link) for link in links],
    }


def _cells(row: Row) -> list[str]:
    scale = {"ms": MILLISECOND, "MB": MEGABYTE, "nats": 1}[row.unit]
    digits = {"ms": 1, "MB": 2, "nats": 4}[row.unit]
    ratio = f"{row.ratio:.2f}"
    if row.low is not None:
        ratio += f" ({row.low:.2f}–{row.high:.2f})"
    values = [f"{value / scale:.{digits}f} {row.unit}" for value in (row.dense, row.compact)]
    return [row.quantity, *values, ratio]


def _row(
    link: str,
    quantity: str,
    unit: str,
    dense: float,
    compact: float,
    low: float | None = None,
    high: float | None = None,
) -> Row:
    return Row(link, quantity, unit, dense, compact, dense / compact, low, high)


def _means(lists: list[list[float]]) -> list[float]:
    """Element by element, the mean over the ranks."""
    return [fmean(values) for values in zip(*lists, strict=True)]
