"""The plot of ``compare_comm.py --pipeline``: times of steps and of messages, a panel a model."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .pipeline_kinds import NOTHING, OURS
from .pipeline_report import Row, places, title_of

STEP, ALONE = "#64748b", "#dc2626"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of all rows to ``path``."""
    panels = [[row for row in rows if row.place == place] for place in places(rows)]
    columns = 2
    lines = -(-len(panels) // columns)
    size = (6.6 * columns, (0.34 * max(map(len, panels)) + 1.2) * lines + 0.5)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    """A bar a side; the part of it that waits for sends, and the ratio to dense beside it."""
    free = next(row for row in rows if row.kind == NOTHING).time.value * 1e3
    for place, row in enumerate(rows):
        step = row.time.value * 1e3
        computing = min(step, free)
        first = place == 0
        axis.barh(place, computing, color=STEP, label="as without sends" if first else None)
        label = "what sends add" if first else None
        axis.barh(place, step - computing, left=computing, color=ALONE, label=label)
        axis.annotate(
            f"{step:.0f} ms  ({row.ratio.value:.2g}×)",
            (step, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind in OURS else None,
        )
    axis.set_xlim(0, max(row.time.value for row in rows) * 1.3e3)
    axis.set_yticks(range(len(rows)), [row.kind for row in rows])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title_of(*rows[0].place), fontsize=10)
    axis.set_xlabel("ms of a step (times as fast as torch's own dense sends)", fontsize=8)
