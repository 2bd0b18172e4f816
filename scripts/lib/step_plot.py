"""The plot of ``bench_step.py``: losses of all, then what a step consists of, a panel a link.

One line of panels for what is computed in.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from .bench import link_name
from .step_kinds import DENSE_BF16, DENSE_FP32, OURS, POWERSGD
from .step_report import PHASES, Cost, Row, reference_of, sections

COLOURS = {
    "forward": "#9aa5b1",
    "backward": "#64748b",
    "exposed": "#c2410c",
    "optimizer": "#0f766e",
}
LABELS = {
    "exposed": "exposed communication",
    "optimizer": "optimizer and masks",
}
# Drawn in this order, wide lines first: most curves lie on one another.
CURVES = {
    DENSE_FP32: ("#9aa5b1", 6.0),
    DENSE_BF16: ("#1e3a5f", 3.2),
    OURS: ("#f97316", 1.2),
    POWERSGD: ("#a21caf", 1.2),
}
SMALLEST = 1e-8  # difference of losses that the plot shows; equal ones stand there


def draw(rows: Sequence[Row], costs: Sequence[Cost], path: Path) -> None:
    """Write the plot of all rows to ``path``; each section has the same kinds."""
    computes = list(dict.fromkeys(row.compute for row in rows))
    panels = len(sections(rows)) // len(computes)
    height = 0.36 * len(rows) / len(sections(rows)) + 2.2
    size = (10.2 + 4.0 * panels, height * len(computes))
    figure = plt.figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(computes), 1, squeeze=False)
    for part, compute in zip(parts[:, 0], computes, strict=True):
        part.suptitle(f"computing in {compute}", fontsize=12, fontweight="bold")
        _draw_compute(
            part,
            [row for row in rows if row.compute == compute],
            [cost for cost in costs if cost.compute == compute],
        )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_compute(figure: SubFigure, rows: Sequence[Row], costs: Sequence[Cost]) -> None:
    """Losses, a panel a link and density, and the costs, side by side."""
    panels = [[row for row in rows if row.section == section] for section in sections(rows)]
    widths = [1.0, *(1.15 for _ in panels), 0.8]
    grid = figure.add_gridspec(2, len(widths), width_ratios=widths, height_ratios=[2, 1])
    losses = figure.add_subplot(grid[0, 0])
    _losses(losses, panels[0])
    _differences(figure.add_subplot(grid[1, 0], sharex=losses), panels[0])
    axes = [figure.add_subplot(grid[:, column]) for column in range(1, len(widths))]
    for axis, of_this in zip(axes[:-1], panels, strict=True):
        _steps(axis, of_this)
        title = f"A step, {link_name(of_this[0].link)}, f = {of_this[0].density:g}"
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("ms (times as fast as the better dense bf16)")
    for axis in axes[1:-1]:
        axis.set_yticklabels([])
    axes[0].legend(loc="lower right", fontsize=8, framealpha=1, edgecolor="white")
    _costs(axes[-1], costs)


def _losses(axis: Axes, rows: Sequence[Row]) -> None:
    found = {row.kind: row for row in rows}
    for kind, (colour, width) in CURVES.items():
        losses = found[kind].losses
        steps = range(1, len(losses) + 1)
        axis.plot(steps, losses, color=colour, linewidth=width, label=kind)
    for kind, row in found.items():  # the others, so that one that strays is seen
        if kind not in CURVES:
            axis.plot(range(1, len(row.losses) + 1), row.losses, color="black", linewidth=0.4)
    axis.set_title(f"Losses of all {len(rows)}, f = {rows[0].density:g}", fontsize=11)
    axis.set_ylabel("nats per byte")
    axis.tick_params(axis="x", labelbottom=False)
    axis.legend(fontsize=8, framealpha=1, edgecolor="white")


def _differences(axis: Axes, rows: Sequence[Row]) -> None:
    """How far the losses are from those of dense training of the same precision."""
    found = {row.kind: row for row in rows}
    for kind, row in found.items():
        reference = found[reference_of(kind)]
        both = zip(row.losses, reference.losses, strict=True)
        lengths = [max(abs(a - b), SMALLEST) for a, b in both]
        colour, width = CURVES.get(kind, ("black", 0.4))
        axis.plot(range(1, len(lengths) + 1), lengths, color=colour, linewidth=width)
    axis.set_yscale("log")
    axis.set_ylabel("difference\nfrom dense")
    axis.set_xlabel("step (thin black: the others)")


def _steps(axis: Axes, rows: Sequence[Row]) -> None:
    """A bar a training, its phases one after the other."""
    ends = [0.0] * len(rows)
    for name in PHASES:
        lengths = [row.phases[name] * 1e3 for row in rows]
        axis.barh(
            range(len(rows)),
            lengths,
            height=0.7,
            left=ends,
            color=COLOURS[name],
            label=LABELS.get(name, name),
        )
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for position, (row, end) in enumerate(zip(rows, ends, strict=True)):
        axis.annotate(
            f"{row.time.value * 1e3:.0f}  ({row.ratio.value:.2g}×)",
            (end, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind == OURS else None,
        )
    axis.set_xlim(0, max(ends) * 1.3)  # room for the numbers
    axis.set_yticks(range(len(rows)), [row.kind for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _costs(axis: Axes, costs: Sequence[Cost]) -> None:
    """What compaction adds on one process."""
    compact = [cost for cost in costs if cost.kind.startswith("compact")]
    parts = (
        ("forward and backward", "#64748b", [cost.forward_backward_ratio for cost in compact]),
        ("whole step", "#0f766e", [cost.step_ratio for cost in compact]),
    )
    for index, (label, colour, ratios) in enumerate(parts):
        places = [position + 0.4 * index - 0.2 for position in range(len(compact))]
        heights = [100 * (ratio.value - 1) for ratio in ratios]
        down = [100 * (ratio.value - ratio.low) for ratio in ratios]
        up = [100 * (ratio.high - ratio.value) for ratio in ratios]
        axis.bar(places, heights, 0.38, color=colour, label=label)
        axis.errorbar(places, heights, yerr=[down, up], fmt="none", ecolor="black", elinewidth=0.8)
    names = [f"{cost.kind.removeprefix('compact, ')}\nf = {cost.density:g}" for cost in compact]
    axis.set_xticks(range(len(compact)), names)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("% more than masked dense")
    axis.set_title("Compaction, one process", fontsize=11)
    axis.legend(fontsize=8, framealpha=1, edgecolor="white")
    axis.spines[["top", "right"]].set_visible(False)
