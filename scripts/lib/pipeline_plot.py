"""The plot of ``compare_comm.py --pipeline``: times of steps, a panel a model, a bar a link."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .bench import link_name
from .pipeline_kinds import NOTHING, OURS
from .pipeline_report import Row

COMPUTING = ("#64748b", "#cbd5e1")  # by link
SENDING = ("#dc2626", "#fca5a5")
COLUMNS = 3


def draw(rows: Sequence[Row], path: Path) -> None:
    """Write the plot of all rows to ``path``."""
    sections = list(dict.fromkeys(row.section for row in rows))
    links = list(dict.fromkeys(row.link for row in rows))
    columns = min(COLUMNS, len(sections))
    lines = -(-len(sections) // columns)
    kinds = len(dict.fromkeys(row.kind for row in rows))
    size = (6 * columns, (0.2 * kinds * (1 + len(links)) + 0.8) * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, section in zip(axes.flat, sections, strict=False):
        _panel(axis, [row for row in rows if row.section == section], links)
    for axis in axes.flat[len(sections) :]:
        axis.remove()
    handles = []
    for number, link in enumerate(links):
        name = link_name(link)
        handles.append(Patch(color=_of(COMPUTING, number), label=f"{name}: as without sends"))
        handles.append(Patch(color=_of(SENDING, number), label=f"{name}: what sends add"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.supxlabel("ms of a step (times as fast as torch's own dense sends)", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _of(colours: Sequence[str], number: int) -> str:
    return colours[min(number, len(colours) - 1)]


def _panel(axis: Axes, rows: Sequence[Row], links: Sequence[str]) -> None:
    """Bars of a side, one a link: the part that waits for sends, and the ratio to dense beside."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    free = {row.link: row.time.value * 1e3 for row in rows if row.kind == NOTHING}
    height = 0.84 / len(links)
    for row in rows:
        number = links.index(row.link)
        place = kinds.index(row.kind) + (number - (len(links) - 1) / 2) * height
        step = row.time.value * 1e3
        computing = min(step, free[row.link])
        axis.barh(place, computing, height, color=_of(COMPUTING, number))
        axis.barh(place, step - computing, height, left=computing, color=_of(SENDING, number))
        axis.annotate(
            f"{step:.0f} ms  ({row.ratio.value:.2f}×)",
            (step, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if row.kind in OURS else None,
        )
    axis.set_xlim(0, max(row.time.value for row in rows) * 1.3e3)
    axis.set_yticks(range(len(kinds)), kinds)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in OURS else "normal")
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    model, stages, dtype = rows[0].section
    axis.set_title(f"{model}, {stages} stages, {dtype}", fontsize=11)
