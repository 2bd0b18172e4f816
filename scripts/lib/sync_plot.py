"""The plot of ``bench_sync.py``: a panel a link, a bar a way to reduce gradients."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from .sync_report import OURS, Row, heading

OURS_COLOUR, OURS_FP32_COLOUR, OTHERS_COLOUR = "#c2410c", "#fb923c", "#9aa5b1"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of all rows to ``path``; every link has the same rows in the same order."""
    links = list(dict.fromkeys(row.link for row in rows))
    of_link = [[row for row in rows if row.link == link] for link in links]
    figure, axes = plt.subplots(
        1,
        len(links),
        figsize=(2.6 + 3.8 * len(links), 0.36 * len(of_link[0]) + 1.5),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, link, of_this in zip(axes[0], links, of_link, strict=True):
        _bars(axis, of_this)
        axis.set_title(heading(link).replace(" (", "\n("), fontsize=11)
    axes[0, 0].set_yticks(range(len(of_link[0])), [row.label for row in of_link[0]])
    axes[0, 0].invert_yaxis()
    figure.supxlabel("ms until all gradients are averaged, log scale (times as fast as dense bf16)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(axis: Axes, rows: Sequence[Row]) -> None:
    times = [row.time.value * 1e3 for row in rows]
    ends = [
        [(row.time.value - row.time.low) * 1e3 for row in rows],
        [(row.time.high - row.time.value) * 1e3 for row in rows],
    ]
    axis.barh(range(len(rows)), times, height=0.7, color=[_colour(row) for row in rows])
    axis.errorbar(times, range(len(rows)), xerr=ends, fmt="none", ecolor="black", elinewidth=0.8)
    for position, row in enumerate(rows):
        digits = 0 if times[position] >= 100 else 1
        axis.annotate(
            f"{times[position]:.{digits}f}  ({row.bf16_ratio.value:.2g}×)",
            (row.time.high * 1e3, position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind == OURS else None,
        )
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 2, max(times) * 12)  # room for the numbers
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(row: Row) -> str:
    if row.kind == OURS:
        return OURS_COLOUR
    return OURS_FP32_COLOUR if row.kind.startswith("sparse_comm") else OTHERS_COLOUR
