"""Draws docs/pipeline.png: which boundaries between pipeline stages can be packed, which not."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

GREEN, YELLOW, RED, GREY = "#15803d", "#ca8a04", "#b91c1c", "#e2e8f0"
ROWS = (
    (("Conv", "BatchNorm", "ReLU"), ("Conv",), GREEN, "non-zeros", "the same entries, no bits"),
    (("Linear", "ReLU²"), ("Linear",), GREEN, "non-zeros", "the same entries, no bits"),
    (("Conv", "ReLU", "MaxPool"), ("Conv",), GREEN, "non-zeros", "the same entries, no bits"),
    (("Linear\nrows pruned", "GELU"), ("Linear",), GREEN, "kept channels", "kept channels"),
    (("Linear", "GELU"), ("Linear\ncolumns pruned",), GREEN, "kept channels", "kept channels"),
    (("compiled\n… ReLU",), ("Linear",), YELLOW, "non-zeros", "everything"),
    (("Linear",), ("ReLU", "Linear"), RED, "everything", "everything: cut behind the ReLU"),
    (("x + MLP(x)",), ("LayerNorm",), RED, "everything", "everything: a residual stream"),
)
WIDTH, HEIGHT, GAP = 1.65, 0.62, 0.14


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[1] / "docs" / "pipeline.png"
    parser.add_argument(
        "--out", type=Path, default=default, help="file to write (docs/pipeline.png)"
    )
    options = parser.parse_args()
    figure, axis = plt.subplots(figsize=(11, 0.72 * len(ROWS) + 0.8), layout="constrained")
    for x, text, align in (
        (-1.0, "ends a stage", "right"),
        (1.0, "begins the next", "left"),
        (5.4, "activations  →", "center"),
        (8.6, "←  gradients", "center"),
    ):
        axis.text(x, 0.85, text, ha=align, va="center", fontsize=11, fontweight="bold")
    for number, row in enumerate(ROWS):
        draw_row(axis, -number, *row)
    axis.plot([0, 0], [0.5, -len(ROWS) + 0.5], color="black", linewidth=1.5, linestyle="--")
    axis.set_xlim(-5.7, 10.7)
    axis.set_ylim(-len(ROWS) + 0.45, 1.15)
    axis.axis("off")
    figure.savefig(options.out, dpi=110)
    print(f"Written: {options.out.name}")


def draw_row(
    axis: Axes,
    y: float,
    writer: tuple[str, ...],
    reader: tuple[str, ...],
    colour: str,
    forward: str,
    back: str,
) -> None:
    """One boundary: layers on both sides, and what travels."""
    for place, text in enumerate(reversed(writer)):
        box(axis, -0.3 - (place + 1) * WIDTH - place * GAP, y, text)
    for place, text in enumerate(reader):
        box(axis, 0.3 + place * (WIDTH + GAP), y, text)
    axis.annotate("", (0.28, y), (-0.28, y), arrowprops={"arrowstyle": "<->", "color": colour})
    for x, text in ((5.4, forward), (8.6, back)):
        axis.text(x, y, text, ha="center", va="center", fontsize=10, color=colour)


def box(axis: Axes, left: float, y: float, text: str) -> None:
    """A layer."""
    corner = (left, y - HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.08"
    axis.add_patch(
        FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor=GREY, linewidth=0)
    )
    axis.text(left + WIDTH / 2, y, text, ha="center", va="center", fontsize=9)


if __name__ == "__main__":
    main()
