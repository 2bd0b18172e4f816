"""The quickstart's one plot: loss curves, bytes and times of dense and compact training."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .quickstart_report import SCALE, Row, StageResult

COLOURS = {"dense": "#9aa5b1", "compact": "#c2410c"}
TICKS = {
    "communication time": "commu-\nnication",
    "exposed communication time": "exposed\ncommu-\nnication",
    "step time": "step",
    "bytes on the wire": "sent\nper step",
    "bytes of model state": "model\nstate",
}


def draw(rows: list[Row], stage: StageResult, path: Path) -> None:
    """Write the plot of the table's rows and of one stage's losses to ``path``."""
    plt.switch_backend("Agg")  # no display needed
    links = list(dict.fromkeys(row.link for row in rows if row.unit == "ms"))
    of_times = "abc"[: len(links)]
    mosaic = f"LLB;{of_times}" if len(links) == 3 else f"LB{of_times}"
    rows_of_plots = mosaic.count(";") + 1
    figure, axes = plt.subplot_mosaic(
        mosaic, figsize=(12, 4.2 * rows_of_plots), layout="constrained"
    )
    _losses(axes["L"], stage)
    # fp32's bytes on the wire: they are nearly the same on every link
    of_link = links[min(1, len(links) - 1)]
    sent = [row for row in rows if row.unit == "MB" and row.link == of_link]
    state = [row for row in rows if row.unit == "MB" and not row.link]
    _bars(axes["B"], [*sent, *state], "MB per rank")
    axes["B"].set_title("Bytes")
    axes["B"].legend(loc="upper left", frameon=False)
    time_axes = [axes[letter] for letter in of_times]
    for axis, link in zip(time_axes, links, strict=True):
        _bars(axis, [row for row in rows if row.unit == "ms" and row.link == link], "ms (median)")
        axis.set_title("Time per step\n" + link)
    highest = max(axis.get_ylim()[1] for axis in time_axes)
    for axis in time_axes:  # one scale, so that links can be compared
        axis.set_ylim(0, highest)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(axis: Axes, stage: StageResult) -> None:
    warm_up = stage.warm_up_losses()
    start = len(warm_up)
    dense, compact = stage.losses("dense"), stage.losses("compact")
    steps = range(start + 1, start + 1 + len(dense))
    axis.plot(range(1, start + 1), warm_up, color="black", linewidth=1, label="dense warm-up")
    axis.plot(steps, dense, color=COLOURS["dense"], linewidth=5, label="pruned, masked dense")
    axis.plot(steps, compact, color=COLOURS["compact"], linewidth=1.2, label="pruned, compact")
    axis.axvline(start + 0.5, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, start + len(dense) + 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats per byte)")
    axis.set_title(f"Loss: largest difference {stage.largest_loss_difference():.0e}")
    axis.legend(loc="lower left", framealpha=1, edgecolor="white")


def _bars(axis: Axes, rows: list[Row], unit: str) -> None:
    """Pairs of bars from 0, each pair with its ratio above."""
    width = 0.38
    for position, row in enumerate(rows):
        heights = [value / SCALE[row.unit] for value in (row.dense, row.compact)]
        for offset, (side, colour), height in zip(
            (-width / 2, width / 2), COLOURS.items(), heights, strict=True
        ):
            label = side if position == 0 else None
            axis.bar(position + offset, height, width, color=colour, label=label)
        axis.annotate(
            f"÷ {row.ratio:.1f}",
            (position, max(heights)),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axis.set_xticks(range(len(rows)), [TICKS[row.quantity] for row in rows])
    axis.set_ylim(0, axis.get_ylim()[1] * 1.15)
    axis.set_ylabel(unit)
