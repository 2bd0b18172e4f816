"""The plot of ``compare_comm.py --framework axonn``: what a step consists of, a panel a grid."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .axonn_kinds import BUBBLE, COLLECTIVE, COMPACT, COMPUTE, OPTIMIZER, POINT_TO_POINT
from .axonn_report import Row, sections, title_of
from .compare_plot import draw_steps, finish

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
    finish(figure, axes[0, 0], path)


def _steps(axis: Axes, rows: Sequence[Row]) -> None:
    """A bar a side."""
    kinds = [row.kind for row in rows]
    draw_steps(axis, rows, range(len(rows)), kinds, COLOURS, {}, bold=COMPACT)
    axis.set_title(f"{title_of(*rows[0].section)} (stages × replicas)", fontsize=10)
    axis.set_xlabel("ms of a step, mean over ranks (times as fast as AxoNN as released)")
