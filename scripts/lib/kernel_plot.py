"""The plot of ``bench_kernels.py``: how near to what memory allows, and the optimizer step."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from .bench import Estimate
from .kernel_cases import EXPAND, PACK, ours
from .kernel_report import (
    EXPAND_OF_FLOOR,
    FLOOR,
    HEADLINE,
    PACK_OF_FLOOR,
    STEP,
    KernelRow,
)
from .kernel_step import COMPACT, StepRow

OURS, OTHERS, TARGET = "#c2410c", "#9aa5b1", "#111827"
SHOWN = {PACK: ("bf16", "bf16"), EXPAND: ("fp32", "bf16")}


def draw(kernels: Sequence[KernelRow], steps: Sequence[StepRow], path: Path) -> None:
    """Bars of pack and expand as fractions of the floor, those over density, and of the step."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.2), layout="constrained")
    for axis, operation, target in (
        (axes[0, 0], PACK, PACK_OF_FLOOR),
        (axes[0, 1], EXPAND, EXPAND_OF_FLOOR),
    ):
        _fractions(axis, _shown(kernels, operation), target)
    _over_density(axes[1, 0], kernels)
    _steps(axes[1, 1], steps)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _shown(rows: Sequence[KernelRow], operation: str) -> list[KernelRow]:
    return [
        r for r in rows if r.operation == operation and (r.source, r.target) == SHOWN[operation]
    ]


def _ms(time: Estimate) -> str:
    ms = time.value * 1e3
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def _colour(row: KernelRow) -> str:
    return OURS if row.how in ours() else OTHERS


def _fractions(axis: Axes, rows: Sequence[KernelRow], target: float) -> None:
    rows = [row for row in rows if row.density == HEADLINE]
    values = [row.fractions[FLOOR] for row in rows]
    _bars(
        axis,
        [f"sparse_comm {row.how}" if row.how in ours() else row.how for row in rows],
        [(value.value, value.low, value.high) for value in values],
        [f"{v.value:.2f}  ({_ms(row.time)})" for v, row in zip(values, rows, strict=True)],
        [_colour(row) for row in rows],
    )
    axis.axvline(1, color=TARGET, linewidth=1.2)
    axis.axvline(target, color=TARGET, linewidth=1.2, linestyle="--")
    axis.set_xlabel(f"fraction of what memory allows (dashed: target {target:.2f})")
    axis.set_title(f"{rows[0].operation} {rows[0].pair}, f = {HEADLINE:g}: longer is better")


def _over_density(axis: Axes, kernels: Sequence[KernelRow]) -> None:
    for operation, style, marker in ((PACK, "-", "o"), (EXPAND, "--", "s")):
        rows = _shown(kernels, operation)
        densities = list(dict.fromkeys(row.density for row in rows))
        for name, colour, hows in (
            ("sparse_comm", OURS, {ours()[0]}),
            ("best of torch", OTHERS, {row.how for row in rows} - set(ours())),
        ):
            best = [
                max(r.fractions[FLOOR].value for r in rows if r.density == f and r.how in hows)
                for f in densities
            ]
            label = f"{operation}, {name}"
            axis.plot(densities, best, style, marker=marker, color=colour, label=label)
    axis.axhline(1, color=TARGET, linewidth=1.2)
    axis.set_xscale("log")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(densities, [f"{f:g}" for f in densities])
    axis.set_ylim(0, 1.4)
    axis.set_xlabel("density f")
    axis.set_ylabel("fraction of what memory allows")
    axis.set_title("Fraction at other densities: higher is better")
    axis.legend(loc="upper right", frameon=False, ncols=2, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _steps(axis: Axes, rows: Sequence[StepRow]) -> None:
    names = [
        f"{row.how}, f = {row.density:g}" if row.how.startswith(COMPACT) else row.how
        for row in rows
    ]
    _bars(
        axis,
        names,
        [(row.of_best.value, row.of_best.low, row.of_best.high) for row in rows],
        [f"{row.of_best.value:.2f}  ({_ms(row.time)})" for row in rows],
        [OURS if row.how == COMPACT else OTHERS for row in rows],
    )
    for position, row in enumerate(rows):
        if row.how == COMPACT:
            ends = (position - 0.45, position + 0.45)
            mark = (STEP[row.density], STEP[row.density])
            axis.plot(mark, ends, color=TARGET, linewidth=1.5, linestyle="--")
    axis.set_xlabel("time over that of the faster dense step (dashed: target)")
    axis.set_title(f"AdamW step, {rows[0].numel / 1e6:.0f}M parameters: shorter is better")


def _bars(
    axis: Axes,
    names: Sequence[str],
    values: Sequence[tuple[float, float, float]],
    labels: Sequence[str],
    colours: Sequence[str],
) -> None:
    """Horizontal bars with their intervals, the first on top, and room for the labels."""
    positions = range(len(names))
    middle = [value for value, _, _ in values]
    axis.barh(positions, middle, height=0.66, color=colours)
    furthest = 1.15 * max(*middle, 1)
    axis.set_xlim(0, 1.3 * furthest)
    reach = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
    axis.errorbar(middle, positions, xerr=reach, fmt="none", ecolor="black", elinewidth=0.8)
    for position, ((_, _, high), label) in enumerate(zip(values, labels, strict=True)):
        axis.annotate(
            label,
            (min(high, furthest), position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the floor's line
        )
    axis.set_yticks(positions, names)
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
