"""The quickstart's one plot: loss curves, bytes and times of dense and compact training."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .quickstart_report import MEGABYTE, MILLISECOND, LinkResult, Row

COLOURS = {"dense": "#9aa5b1", "compact": "#c2410c"}


def draw(rows: list[Row], link: LinkResult, warm_up: list[float], path: Path) -> None:
    """Write the plot of the table's rows and of one link's losses to ``path``."""
    timed = list(dict.fromkeys(row.link for row in rows if row.unit == "ms"))
    widths = [1.5, 1] + [1] * len(timed)
    figure, axes = plt.subplots(
        1, len(widths), figsize=(3.6 * sum(widths), 4.6), width_ratios=widths, layout="constrained"
    )
    _losses(axes[0], warm_up, link)
    _bars(axes[1], [row for row in rows if row.unit == "MB"], MEGABYTE, "MB per rank")
    axes[1].set_title("Bytes")
    time_axes = axes[2:]
    for axis, name in zip(time_axes, timed, strict=True):
        times = [row for row in rows if row.unit == "ms" and row.link == name]
        _bars(axis, times, MILLISECOND, "ms per step (median)")
        axis.set_title(f"Time: {name}")
    highest = max(axis.get_ylim()[1] for axis in time_axes)
    for axis in time_axes:  # one scale, so that links can be compared
        axis.set_ylim(0, highest)
    axes[1].legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(axis: Axes, warm_up: list[float], link: LinkResult) -> None:
    start = len(warm_up)
    axis.plot(range(1, start + 1), warm_up, color="#64748b", linewidth=1, label="dense warm-up")
    steps = range(start + 1, start + 1 + len(link.dense.losses))
    axis.plot(steps, link.dense.losses, color=COLOURS["dense"], linewidth=5, label="masked dense")
    axis.plot(steps, link.compact.losses, color=COLOURS["compact"], linewidth=1.2, label="compact")
    axis.axvline(start + 0.5, color="black", linewidth=0.8, linestyle=":")
    axis.annotate(" pruned", (start + 0.5, 0.1), fontsize=9)
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("training loss (nats per byte)")
    axis.set_title("The two loss curves lie on each other")
    axis.legend(loc="lower left", frameon=False)


def _bars(axis: Axes, rows: list[Row], scale: float, unit: str) -> None:
    """Pairs of bars, each pair with its ratio above."""
    width = 0.38
    for position, row in enumerate(rows):
        heights = {"dense": row.dense / scale, "compact": row.compact / scale}
        for offset, (side, height) in zip((-width / 2, width / 2), heights.items(), strict=True):
            label = side if position == 0 else None
            axis.bar(position + offset, height, width, color=COLOURS[side], label=label)
        axis.annotate(
            f"÷ {row.ratio:.1f}",
            (position, max(heights.values())),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    axis.set_xticks(range(len(rows)), [_short(row) for row in rows], fontsize=9)
    axis.set_ylim(0, axis.get_ylim()[1] * 1.12)
    axis.set_ylabel(unit)


def _short(row: Row) -> str:
    """A tick label in few narrow lines."""
    label = row.quantity.replace(" time", "").replace("bytes of ", "").replace("bytes on ", "on ")
    if row.unit == "MB" and row.link:
        label += f" ({row.link})"
    return label.replace(" ", "\n")
