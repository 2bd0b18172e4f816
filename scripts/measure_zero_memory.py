"""Measures bytes a parameter under DeepSpeed, dense and compact, from resident memory.

In each ZeRO stage two ranks train a GPT of two sizes in bf16, all else as DeepSpeed has it, and
read their resident memory between two steps. The difference over the difference in parameters is
what a parameter takes. Compact should take f of what the same config takes dense, 0.127 bytes for
the pattern, and 2 for a cached dense weight. Ends with status 1 if it takes 5 % more.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

from rich.console import Console

from lib import deepspeed_run, memory_plot, results
from lib.bench import RANKS
from lib.job import add_bar, progress_bars, run_job, run_script
from lib.memory_rank import CONTEXT, STEPS
from measure_memory import ENVIRONMENT, PATTERN, TOLERANCE

NAME = "memory"
WRITTEN = f"{NAME}.md, {NAME}.json and {NAME}.png"
DENSE, CACHED, TRANSIENT = "dense", "cached", "transient"
CACHE = 2.0  # bytes a parameter, of a dense weight in bf16


@dataclass(frozen=True)
class Row:
    """Bytes of one process, means of the ranks."""

    stage: int
    weights: str
    density: float  # of the parameters that make the difference
    parameters: tuple[int, int]
    resident: tuple[float, float]
    expected: float  # bytes a parameter

    @property
    def slope(self) -> float:
        return _slope(self.resident, self.parameters)

    @property
    def deviation(self) -> float:
        return self.slope / self.expected - 1

    @property
    def name(self) -> str:
        return f"ZeRO {self.stage}, {self.weights}"


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The measurement",
        options.out,
        WRITTEN,
        measure=lambda console: run_all(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: row.deviation > TOLERANCE,
        complaint=f"More than {TOLERANCE:.0%} above",
        packages=("deepspeed",),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some six minutes on two cores, and 8 GB of memory.",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs=2,
        default=(1, 3),
        metavar=("SMALL", "LARGE"),
        help="transformer blocks of the two models (default: 1 3: 50M and 150M parameters)",
    )
    deepspeed_run.add_gpt_arguments(parser)
    options = parser.parse_args()
    small, large = options.layers
    if not 0 < small < large:
        parser.error(f"--layers is {small} {large}; the second must be larger, the first above 0")
    deepspeed_run.check_gpt_arguments(parser, options)
    deepspeed_run.prepare(parser)
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    rows: list[Row] = []
    with progress_bars(console) as progress:
        for stage in options.stages:
            dense: Row | None = None
            for weights in (DENSE, TRANSIENT, CACHED) if stage < 3 else (DENSE, TRANSIENT):
                total = sum(options.layers) + 2 * STEPS
                bar = add_bar(progress, f"ZeRO {stage}, {weights}", total)
                row = measure(stage, weights, dense, options, bar)
                dense = dense or row
                rows.append(row)
    return rows


def measure(
    stage: int,
    weights: str,
    dense: Row | None,
    options: argparse.Namespace,
    on_progress: Callable[[dict], None],
) -> Row:
    """One size after the other."""
    job = {
        "stage": stage,
        "weights": weights,
        "density": options.density,
        "width": options.width,
        "ranks": RANKS,
        "wrap": "",
        "autocast": False,
    }
    ranks = [
        run_job("lib.zero_memory_rank", job | {"layers": n}, RANKS, on_progress, ENVIRONMENT)
        for n in options.layers
    ]
    small, large = ranks
    resident = fmean(r["resident"] for r in small), fmean(r["resident"] for r in large)
    entries = small[0]["entries"], large[0]["entries"]
    parameters = entries if dense is None else dense.parameters
    density = _slope(entries, parameters)
    if dense is None:
        return Row(stage, weights, density, parameters, resident, _slope(resident, parameters))
    expected = density * dense.slope + PATTERN + (CACHE if weights == CACHED else 0)
    return Row(stage, weights, density, parameters, resident, expected)


def write(rows: list[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    head = ("", "f", "expected", "measured", "deviation", "of dense")
    lines = []
    for row in rows:
        dense = next(other for other in rows if other.stage == row.stage)
        numbers = (f"{row.expected:.3f}", f"{row.slope:.3f}", f"{row.deviation:+.1%}")
        lines.append((row.name, f"{row.density:.4f}", *numbers, f"{row.slope / dense.slope:.3f}"))
    facts = [asdict(row) | {"slope": row.slope, "deviation": row.deviation} for row in rows]
    small, large = rows[0].parameters
    notes = [
        f"- Bytes a parameter and process: the difference in resident memory between a GPT of "
        f"{large / 1e6:.0f}M and one of {small / 1e6:.0f}M parameters, over the difference in "
        f"parameters; two ranks, their mean; after {STEPS} steps, between two.",
        "- *Expected* is f × what the same config takes dense, + 0.127 for the pattern, + 2 if "
        "dense weights are cached. A deviation below zero is memory that is not taken.",
        "- bf16, torch's fused AdamW, DeepSpeed's default settings. "
        f"Sequences have {CONTEXT} tokens.",
    ]
    table = results.markdown_table(head, lines)
    parts = [table, f"![measured and expected]({NAME}.png)", "\n".join(notes)]
    settings = {"layers": options.layers, "width": options.width, "density": options.density}
    title = "Bytes a parameter under DeepSpeed"
    options.out.mkdir(parents=True, exist_ok=True)
    results.write(options.out, NAME, {"settings": settings, "rows": facts}, title, parts, origin)
    memory_plot.draw(
        [row.name for row in rows],
        [row.slope for row in rows],
        [row.expected for row in rows],
        options.out / f"{NAME}.png",
    )


def _slope(values: tuple[float, ...], parameters: tuple[float, ...]) -> float:
    return (values[1] - values[0]) / (parameters[1] - parameters[0])


if __name__ == "__main__":
    sys.exit(main())
