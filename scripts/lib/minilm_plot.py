"""The plot of ``finetune_minilm.py``: losses, and what a step sends and takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Wide under narrow: the curves lie on one another.
STYLES = {"masked dense": ("#1e3a5f", 4.0), "compact": ("#f97316", 1.4)}


def draw(rows: Sequence[Any], path: Path) -> None:
    """Write the plot of all rows to ``path``."""
    figure, (losses, sent, times) = plt.subplots(
        1, 3, figsize=(12, 3.6), layout="constrained", width_ratios=[2, 1, 1]
    )
    stages = list(dict.fromkeys(row.stage for row in rows))
    for row in rows:
        if row.stage == stages[0]:
            colour, width = STYLES[row.side]
            losses.plot(row.losses, color=colour, linewidth=width, label=row.side)
    losses.set(xlabel="step", ylabel="training loss, as the Trainer logs it")
    losses.set_title(f"ZeRO {stages[0]}", loc="left")
    losses.legend(frameon=False)
    for axes, values, unit in (
        (sent, [(row.sent or 0) / 1e6 for row in rows], "MB that a rank sends a step"),
        (times, [row.time.value * 1e3 for row in rows], "ms a step, median"),
    ):
        for at, (row, value) in enumerate(zip(rows, values, strict=True)):
            axes.bar(at, value, color=STYLES[row.side][0])
            axes.text(at, value, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
        names = [f"ZeRO {row.stage}\n{row.side.replace(' ', chr(10))}" for row in rows]
        axes.set_xticks(range(len(rows)), names, fontsize=8)
        axes.set_title(unit, fontsize=10, loc="left")
    for axes in (losses, sent, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
