"""Measures bytes of model state per parameter, from resident memory, against the formulas.

Trains models of two sizes, each in fresh processes, and reads their resident memory between two
steps, gradients included. The difference over the difference in parameters is what a parameter
takes; interpreter, libraries and buffers of constant size cancel. Ends with status 1 if a
configuration is more than 5 % from its formula.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console

from lib import memory_plot, results
from lib.job import add_bar, progress_bars, run_job, run_script
from lib.memory_rank import CONTEXT, STEPS

TOLERANCE = 0.05
PATTERN = 1 / 8 + 8 / 4096  # bytes a parameter: a bit, and a 64-bit offset per 4096-entry block
ADAMW = 16  # bytes an entry: fp32 value, gradient and two moments

# glibc's malloc takes tensors from the system one by one and gives them back when they are freed.
# By default it raises this threshold as the program runs, and keeps what smaller ones leave.
ENVIRONMENT = ["env", "MALLOC_MMAP_THRESHOLD_=65536"]


@dataclass(frozen=True)
class Configuration:
    """What is measured; ``dense`` and ``entry`` are the formula's bytes, a parameter and an entry.

    A parameter takes ``dense + entry * f`` bytes, where f is the density.
    """

    name: str
    formula: str
    dense: float
    entry: float
    weights: str
    density: float = 0.1
    wrap: str = ""
    ranks: int = 1
    autocast: bool = False
    bucket_view: bool = True


def configurations() -> list[Configuration]:
    pattern = f"{PATTERN:.3f}"
    dense = Configuration("dense fp32", f"{ADAMW}", ADAMW, 0, "dense", density=1.0)
    rows = [dense]
    for f in (0.1, 0.2):
        rows.append(
            Configuration(
                "cached bf16 weight, autocast",
                f"2 + 16f + {pattern}",
                2 + PATTERN,
                ADAMW,
                "cached",
                f,
                autocast=True,
            )
        )
    plain = (f"16f + {pattern}", PATTERN, ADAMW, "transient")
    rows += [Configuration("transient", *plain, f) for f in (0.1, 0.2)]
    rows.append(Configuration("transient, DDP, gradient_as_bucket_view", *plain, wrap="ddp"))
    copies = (f"20f + {pattern}", PATTERN, ADAMW + 4, "transient")
    rows.append(Configuration("transient, DDP", *copies, wrap="ddp", bucket_view=False))
    shards = (f"16f/2 + {pattern}", PATTERN, ADAMW / 2, "transient")
    rows.append(Configuration("transient, FSDP2, 2 ranks", *shards, wrap="fsdp2", ranks=2))
    return rows


@dataclass(frozen=True)
class Row:
    """Bytes of one process; of several ranks, the mean."""

    name: str
    formula: str
    density: float  # true density of the parameters that make the difference
    blocks: tuple[int, int]  # of the small and the large model
    parameters: tuple[int, int]
    resident: tuple[float, float]
    counted: tuple[float, float]  # by sparse_comm.summary
    expected_slope: float  # bytes a parameter, by the formula

    @property
    def slope(self) -> float:
        return _slope(self.resident, self.parameters)

    @property
    def deviation(self) -> float:
        return self.slope / self.expected_slope - 1

    @property
    def counted_slope(self) -> float:
        return _slope(self.counted, self.parameters)

    @property
    def uncounted_per_block(self) -> float:
        """Resident bytes that no counted tensor accounts for, in each block."""
        uncounted = [r - c for r, c in zip(self.resident, self.counted, strict=True)]
        return (uncounted[1] - uncounted[0]) / (self.blocks[1] - self.blocks[0])


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The measurement",
        options.out,
        "memory.md, memory.json and memory.png",
        measure=lambda console: run_all(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: abs(row.deviation) > TOLERANCE,
        complaint=f"More than {TOLERANCE:.0%} from the formula",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes memory.md, memory.json and memory.png. Takes some five minutes on two "
        "cores, and up to 17 bytes a parameter of the large model: 5.3 GB by default.",
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs=2,
        default=(2, 6),
        metavar=("SMALL", "LARGE"),
        help="transformer blocks of the two models (default: 2 6, which is 100M and 300M "
        "parameters)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=2048,
        help="of both models, a multiple of 64; a block has 12 width² parameters "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "memory",
        help="folder for the results (default: results/memory of the checkout)",
    )
    options = parser.parse_args()
    if options.width % 64 or options.width < 64:
        parser.error(f"--width is {options.width}; it must be a multiple of 64, such as 2048")
    small, large = options.layers
    if not 0 < small < large:
        parser.error(f"--layers is {small} {large}; the second must be larger, the first above 0")
    needed = 17 * 12 * options.width**2 * large
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        parser.error(
            f"the dense model would take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "choose a smaller --width or smaller --layers"
        )
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    rows = []
    with progress_bars(console) as progress:
        for configuration in configurations():
            text = f"{configuration.name}, f = {configuration.density:g}"
            on_progress = add_bar(progress, text, total=sum(options.layers) + 2 * STEPS)
            rows.append(measure(configuration, options, on_progress))
    return rows


def measure(
    configuration: Configuration,
    options: argparse.Namespace,
    on_progress: Callable[[dict], None],
) -> Row:
    """One after the other, so that no more than one model is in memory."""
    small, large = (
        run_job(
            "lib.memory_rank",
            asdict(configuration) | {"layers": layers, "width": options.width},
            configuration.ranks,
            on_progress,
            prefix=ENVIRONMENT,
        )
        for layers in options.layers
    )

    def of_ranks(key: str) -> tuple[float, float]:
        return fmean(rank[key] for rank in small), fmean(rank[key] for rank in large)

    parameters = small[0]["parameters"], large[0]["parameters"]
    density = _slope((small[0]["unpruned"], large[0]["unpruned"]), parameters)
    return Row(
        configuration.name,
        configuration.formula,
        density,
        tuple(options.layers),
        parameters,
        of_ranks("resident"),
        of_ranks("counted"),
        configuration.dense + configuration.entry * density,
    )


def write(rows: list[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    head = ["configuration", "formula", "f", "by the formula", "measured", "deviation"]
    head += ["counted from tensors", "uncounted, MB a block"]
    table = results.markdown_table(head, [_cells(row) for row in rows], texts=2)
    facts = [
        asdict(row)
        | {
            "slope": row.slope,
            "deviation": row.deviation,
            "counted_slope": row.counted_slope,
            "uncounted_per_block": row.uncounted_per_block,
        }
        for row in rows
    ]
    settings = {"layers": options.layers, "width": options.width}
    parts = [table, "![measured and by the formula](memory.png)", "## How to read it", notes(rows)]
    title = "Bytes of model state per parameter"
    results.write(
        options.out, "memory", {"settings": settings, "rows": facts}, title, parts, origin
    )
    memory_plot.draw(
        [f"{row.name}, f = {row.density:.2f}" for row in rows],
        [row.slope for row in rows],
        [row.expected_slope for row in rows],
        options.out / "memory.png",
    )


def _cells(row: Row) -> tuple[str, ...]:
    numbers = (f"{row.expected_slope:.3f}", f"{row.slope:.3f}", f"{row.deviation:+.1%}")
    counted = (f"{row.counted_slope:.3f}", f"{row.uncounted_per_block / 1e6:.2f}")
    return (row.name, row.formula, f"{row.density:.4f}", *numbers, *counted)


def notes(rows: list[Row]) -> str:
    small, large = rows[0].parameters
    constant = fmean(row.resident[0] - row.slope * row.parameters[0] for row in rows)
    lines = [
        f"Bytes per parameter and process: the difference in resident memory (VmRSS) between a "
        f"GPT of {large / 1e6:.0f}M and one of {small / 1e6:.0f}M parameters, over the difference "
        "in parameters. All rows are torch's fused AdamW on fp32 values.",
        "*f* is the density of the parameters that make the difference, unmasked biases and norms "
        "included.",
        f"Resident memory is read after {STEPS} steps and `zero_grad(set_to_none=False)`: values, "
        "gradients, optimizer state, patterns and caches are there, activations are not. Two "
        "ranks: the mean of both. DDP runs with one rank, which has the same buckets as many.",
        f"Sequences have {CONTEXT} tokens. Models are built block by block, and glibc's malloc "
        "runs with a fixed MALLOC_MMAP_THRESHOLD_ of 64 KiB, so that what is freed goes back to "
        "the system and does not count.",
        "*Counted from tensors* is `sparse_comm.summary(model, optimizer).total_bytes`, by its "
        "slope. *Uncounted* is what resident memory has above it, in each block: Python's and "
        "torch's objects for its twelve parameters and the rounding of tensors to whole pages, "
        "which does not grow with the width. It is 1 % here under FSDP2, which keeps more objects, "
        "and more in narrower models: with `--width 1024 --layers 8 24`, as many parameters in "
        "four times the blocks, 4 %. Without `gradient_as_bucket_view`, it is DDP's buckets.",
        f"Interpreter, torch and the unmasked embeddings take some {constant / 1e6:.0f} MB of "
        "every process, which the slope leaves out.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _slope(values: tuple[float, float], parameters: tuple[int, int]) -> float:
    return (values[1] - values[0]) / (parameters[1] - parameters[0])


if __name__ == "__main__":
    sys.exit(main())
