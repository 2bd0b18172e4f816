"""Bars of what steps consist of, for the plots of ``compare_comm.py``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_steps(
    axis: Axes,
    rows: Sequence,
    places: Sequence[float],
    names: Sequence[str],
    colours: Mapping[str, str],
    labels: Mapping[str, str],
    bold: Sequence[str],
) -> None:
    """A bar a row, its phases one after the other; the time that it took and the ratio beside it.

    Args:
        axis: to draw on.
        rows: each with ``phases`` (s), ``time``, ``ratio`` and ``kind``.
        places: of the bars, from above.
        names: how each is called on the left.
        colours: of the phases, in the order in which they are drawn.
        labels: of phases in the legend, where not their names.
        bold: kinds whose times stand out.
    """
    ends = [0.0] * len(rows)
    for phase, colour in colours.items():
        lengths = [row.phases[phase] * 1e3 for row in rows]
        label = labels.get(phase, phase)
        axis.barh(places, lengths, height=0.8, left=ends, color=colour, label=label)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    for place, row, end in zip(places, rows, ends, strict=True):
        axis.annotate(
            f"{row.time.value * 1e3:.0f} ms  ({row.ratio.value:.2g}×)",
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind in bold else None,
        )
    axis.set_xlim(0, max(ends) * 1.3)  # room for the numbers
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: Figure, steps: Axes, path: Path) -> None:
    """Add the legend of the phases drawn on ``steps``, and write the figure to ``path``."""
    handles, labels = steps.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
