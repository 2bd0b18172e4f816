"""The plot of ``measure_memory.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MultipleLocator

MEASURED, FORMULA = "#c2410c", "#111827"


def draw(names: list[str], measured: list[float], formula: list[float], path: Path) -> None:
    """Horizontal bars of bytes per parameter, with a mark where the formula says they end."""
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(names) + 1.5), layout="constrained")
    positions = range(len(names))
    axis.barh(positions, measured, height=0.62, color=MEASURED, label="measured (resident memory)")
    for position, (value, expected) in enumerate(zip(measured, formula, strict=True)):
        ends = (position - 0.42, position + 0.42)
        label = "by the formula" if position == 0 else None
        axis.plot((expected, expected), ends, color=FORMULA, linewidth=2.5, label=label)
        axis.annotate(
            f"{value:.2f}  ({expected:.2f})",
            (max(value, expected), position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axis.set_yticks(positions, names)
    axis.invert_yaxis()
    axis.set_xlim(0, max(*measured, *formula) * 1.2)
    axis.xaxis.set_major_locator(MultipleLocator(2))
    axis.set_xlabel("bytes of model state per parameter and process")
    axis.legend(loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
