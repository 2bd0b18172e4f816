"""The plot of ``compare_comm.py --framework deepspeed``: losses, and what a step consists of."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .bench import link_name
from .compare_plot import draw_steps, finish
from .deepspeed_report import COMPACT, DENSE, Row, links
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
    finish(figure, axes[0, 1], path)


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
    names = [f"ZeRO {row.stage}, {row.kind}" for row in rows]
    draw_steps(axis, rows, places, names, COLOURS, LABELS, bold=COMPACT)
    axis.set_title(f"A step, {link_name(rows[0].link)}", fontsize=11)
    axis.set_xlabel("ms (times as fast as dense)")
