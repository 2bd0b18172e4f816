"""The plot of ``compare_comm.py``: losses, then what a step consists of, a panel a link."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .bench import link_name
from .compare_report import COMPACT, DENSE, PHASES, Row, links
from .step_kinds import CACHED, MASKED_DENSE, TRANSIENT

COLOURS = {"forward": "#9aa5b1", "backward": "#64748b", "optimizer": "#0f766e"}
LABELS = {
    "backward": "backward, with the reduction of gradients",
    "optimizer": "optimizer, with gathering parameters",
}
# Drawn in this order, wide lines first: curves lie on one another.
CURVES = {
    MASKED_DENSE: ("#1e3a5f", 5.0),
    CACHED: ("#f97316", 2.2),
    TRANSIENT: ("#fde047", 0.8),
    DENSE: ("#9aa5b1", 1.2),
}
GAP = 0.6  # between the bars of two stages


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of all rows to ``path``; every link has the same stages and sides."""
    panels = [[row for row in rows if row.link == link] for link in links(rows)]
    widths = [1.0, *(1.1 for _ in panels)]
    size = (5.0 + 5.2 * len(panels), max(0.3 * len(panels[0]) + 2.0, 4.2))
    figure, axes = plt.subplots(
        1, len(widths), figsize=size, width_ratios=widths, layout="constrained", squeeze=False
    )
    _losses(axes[0, 0], panels[0])
    for axis, of_this in zip(axes[0, 1:], panels, strict=True):
        _steps(axis, of_this)
    for axis in axes[0, 2:]:
        axis.set_yticklabels([])
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(PHASES), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(axis: Axes, rows: Sequence[Row]) -> None:
    """Those of all stages: one curve of each side lies on the others, if all train alike."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    for kind, (colour, width) in CURVES.items():
        for number, row in enumerate(row for row in rows if row.kind == kind):
            steps = range(1, len(row.losses) + 1)
            label = None if number else kind
            axis.plot(steps, row.losses, color=colour, linewidth=width, label=label)
    names = ", ".join(str(stage) for stage in stages)
    axis.set_title(f"Losses, ZeRO {names}", fontsize=11)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("nats per byte")
    axis.legend(fontsize=8, framealpha=1, edgecolor="white")


def _steps(axis: Axes, rows: Sequence[Row]) -> None:
    """A bar a side, its phases one after the other; stages stand apart."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    places = [place + GAP * stages.index(row.stage) for place, row in enumerate(rows)]
    ends = [0.0] * len(rows)
    for name in PHASES:
        lengths = [row.phases[name] * 1e3 for row in rows]
        label = LABELS.get(name, name)
        axis.barh(places, lengths, height=0.8, left=ends, color=COLOURS[name], label=label)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, row, end in zip(places, rows, ends, strict=True):
        axis.annotate(
            f"{row.time.value * 1e3:.0f}  ({row.ratio.value:.2g}×)",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind in COMPACT else None,
        )
    axis.set_xlim(0, max(ends) * 1.3)  # room for the numbers
    axis.set_yticks(places, [f"ZeRO {row.stage}, {row.kind}" for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"A step, {link_name(rows[0].link)}", fontsize=11)
    axis.set_xlabel("ms (times as fast as dense)")
