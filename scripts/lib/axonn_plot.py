"""The plot of ``compare_comm.py --framework axonn``: what a step consists of, a panel a grid."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .axonn_kinds import BUBBLE, COLLECTIVE, COMPACT, COMPUTE, OPTIMIZER, PHASES, POINT_TO_POINT
from .axonn_report import Row, sections, title_of

COLOURS = {
    COMPUTE: "#64748b",
    POINT_TO_POINT: "#f59e0b",
    BUBBLE: "#e2e8f0",
    COLLECTIVE: "#dc2626",
    OPTIMIZER: "#0f766e",
}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of all rows to ``path``."""
    panels = [[row for row in rows if row.section == section] for section in sections(rows)]
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    size = (6.4 * columns + 1.2, (0.36 * len(panels[0]) + 1.3) * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for number, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        _steps(axis, panel)
        if number % columns:
            axis.set_yticklabels([])
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(PHASES), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _steps(axis: Axes, rows: Sequence[Row]) -> None:
    """A bar a side, its phases one after the other; the time that it took beside it."""
    places = range(len(rows))
    ends = [0.0] * len(rows)
    for name in PHASES:
        lengths = [row.phases[name] * 1e3 for row in rows]
        axis.barh(places, lengths, height=0.75, left=ends, color=COLOURS[name], label=name)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, row, end in zip(places, rows, ends, strict=True):
        axis.annotate(
            f"{row.time.value * 1e3:.0f} ms  ({row.ratio.value:.2g}×)",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind in COMPACT else None,
        )
    axis.set_xlim(0, max(ends) * 1.28)  # room for the numbers
    axis.set_yticks(list(places), [row.kind for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(f"{title_of(*rows[0].section)} (stages × replicas)", fontsize=10)
    axis.set_xlabel("ms of a step, mean over ranks (times as fast as AxoNN as released)")
