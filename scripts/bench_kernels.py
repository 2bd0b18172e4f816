"""Measures pack and expand against what memory allows and against what torch offers.

In one process and, where nothing else is said, one thread; all sides in turn, in an order that
changes from round to round:

- pack, accumulate and expand of one large tensor, by every back-end and instruction set that this
  machine has and by torch's index_select, masked_select, index_copy_ and the like, as fractions of
  the floor: the bytes that must move at the bandwidth of a non-temporal copy (pack), or of a
  non-temporal zero-fill (expand);
- two threads against one, with the cores free and with another process on one of them, and what
  two threads gain that only copy and fill;
- the optimizer step on compact gradients, pack and expand included, against dense fused AdamW on
  fp32 masters. Dense: the bf16 gradient is upcast to fp32, torch.optim.AdamW(fused=True) steps all
  masters, one fp32 multiplication by the mask holds the pruned ones at zero, and they are copied to
  bf16 weights. Compact: kernels.pack writes the unpruned entries of the dense bf16 gradient to the
  fp32 gradient of the values, torch.optim.AdamW(fused=True) steps the values, and kernels.expand
  writes the dense bf16 weights;
- the time of a call on small tensors.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from lib import kernel_calls, kernel_plot, kernel_report, kernel_step, kernel_threads, results
from lib.job import add_bar, progress_bars, run_script
from lib.kernel_calls import CallRow
from lib.kernel_cases import (
    BF16,
    PAIRS,
    case_turns,
    floor_sides,
    make_case,
    make_dense,
    make_selection,
    ours,
    warm_up,
)
from lib.kernel_floors import Floors, load
from lib.kernel_report import FloorRow, KernelRow
from lib.kernel_step import StepRow
from lib.kernel_threads import ThreadsRow
from lib.kernel_timing import interleave, median
from sparse_comm import kernels

NAME = "kernels"
PLOT = f"{NAME}.png"
WRITTEN = f"{NAME}.md, {NAME}.json and {PLOT}"
DENSITIES = (0.01, 0.05, 0.1, 0.2, 0.5)
FULL: dict[str, Any] = {"numel": 50_000_000, "repeats": 15, "densities": DENSITIES}
QUICK: dict[str, Any] = {"numel": 1_000_000, "repeats": 3, "densities": (0.1, 0.5)}
BYTES = 120  # of memory an entry

Row = TypeVar("Row", FloorRow, KernelRow, ThreadsRow, StepRow, CallRow)
Bar = Callable[[str, int], Callable[[], None]]  # adds one; returns what moves it on


def main() -> int:
    options = parse_arguments()
    torch.set_num_threads(1)
    floors = load()
    return run_script(
        "The benchmark",
        options.out,
        WRITTEN,
        measure=lambda console: run_all(options, floors, console),
        write=lambda rows, origin: write(rows, options, floors, origin),
        is_wrong=lambda row: getattr(row, "wrong", False),
        complaint="Not the reference's result",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some ten minutes, and {BYTES} bytes of memory an entry. "
        "Leave the machine alone meanwhile.",
    )
    parser.add_argument(
        "--numel",
        type=int,
        help=f"entries of the large tensor, and parameters of the optimizer step, as near as "
        f"whole transformer blocks come (default: {FULL['numel']})",
    )
    parser.add_argument(
        "--repeats", type=int, help=f"turns of each side (default: {FULL['repeats']})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small tensor, two densities and few repeats: shows in some seconds that everything "
        "works, but its times mean little",
    )
    parser.add_argument("--seed", type=int, default=0, help="of masks and data (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / NAME,
        help=f"folder for the results (default: results/{NAME} of the checkout)",
    )
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    if options.numel is not None and options.numel < 4096:
        parser.error(f"--numel is {options.numel}; it must be at least 4096")
    if options.repeats is not None and options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs at least 2")
    given = {"numel": options.numel, "repeats": options.repeats}
    options.size = QUICK if options.quick else FULL
    options.size = options.size | {name: n for name, n in given.items() if n is not None}
    needed = BYTES * options.size["numel"]
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        parser.error(
            f"{options.size['numel']} entries would take {needed / 1e9:.1f} GB, {free / 1e9:.1f} "
            "GB are free; choose a smaller --numel"
        )
    return options


def run_all(options: argparse.Namespace, floors: Floors, console: Console) -> list:
    """Rows of all kinds, one section after the other."""
    numel, repeats, seed = options.size["numel"], options.size["repeats"], options.seed
    with progress_bars(console) as progress:

        def bar(text: str, total: int) -> Callable[[], None]:
            advance = add_bar(progress, text, total)
            return lambda: advance({})

        rows: list = measure_floors(numel, repeats, seed, floors, bar)
        rows += measure_kernels(options, floors, bar)
        on_turn = bar("two threads", kernel_threads.total_turns(numel, repeats))
        rows += kernel_threads.measure(numel, repeats, seed, floors, on_turn)
        on_turn = bar("optimizer step", kernel_step.WAYS * repeats)
        rows += kernel_step.measure(numel, repeats, seed, on_turn)
        on_turn = bar("small tensors", kernel_calls.total_turns(repeats))
        rows += kernel_calls.measure(repeats, seed, on_turn)
    return rows


def measure_floors(numel: int, repeats: int, seed: int, floors: Floors, bar: Bar) -> list[FloorRow]:
    dense = make_dense(numel, seed)[BF16]
    sides = floor_sides(
        torch.zeros(dense.nbytes, dtype=torch.uint8), dense, kernel_report.HEADLINE, floors
    )
    on_turn = bar("what memory allows", len(sides) * repeats)
    measured = interleave({name: side for name, (side, _) in sides.items()}, repeats, on_turn)
    times = {name: median(samples) for name, samples in measured.items()}
    return [FloorRow(name, times[name], sides[name][1] / times[name].value) for name in times]


def measure_kernels(options: argparse.Namespace, floors: Floors, bar: Bar) -> list[KernelRow]:
    numel, repeats, densities = (options.size[key] for key in ("numel", "repeats", "densities"))
    on_turn = {
        operation: bar(
            operation,
            len(densities) * sum(case_turns(operation, pair, repeats, floors) for pair in pairs),
        )
        for operation, pairs in PAIRS.items()
    }
    dense = make_dense(numel, options.seed)
    scratch = torch.zeros(max(each.nbytes for each in dense.values()), dtype=torch.uint8)
    rows = []
    for density in densities:  # outermost: what is made for a density takes long
        selection = make_selection(numel, density, options.seed)
        for operation, pairs in PAIRS.items():
            for pair in pairs:
                case = make_case(operation, pair, selection, dense, scratch, floors)
                exact = warm_up(case)
                measured = interleave(case.all_sides(), repeats, on_turn[operation])
                rows += kernel_report.rows_of(case, measured, exact)
    return sorted(rows, key=lambda row: list(PAIRS).index(row.operation))


def notes(options: argparse.Namespace, floors: Floors, steps: Sequence[StepRow]) -> str:
    described = kernels.describe()
    used = f"native, {described['instruction_set']}" if not described["reason"] else "reference"
    lines = [
        f"The large tensor has {options.size['numel']:,} entries, unpruned ones at random places; "
        "all buffers are allocated and warm, and `out=` is given wherever an operation takes it "
        "(`t[bool]` takes none). One thread, but for the section on two. Bold: what users get "
        f"here, {used}" + (f" ({described['reason']})." if described["reason"] else "."),
        "ms: medians of the turns with 95 % bootstrap intervals; ratios are of medians over the "
        "same turns. All sides of a table's dtypes and density take turns in an order that changes "
        "from turn to turn; masked_select and the like have a few turns only.",
        f"Floors: {floors.about}; the fastest of each kind counts. *Of the floor*: the time that "
        "the floor would take for all bytes that must move (dense tensor, bitmap, offsets and "
        "values; values twice to accumulate) over the time taken. For pack and accumulate that is "
        "a non-temporal copy, which counts what it reads and what it writes; for expand a "
        "non-temporal fill with zeros. Memory may allow less than that. Pack mostly reads: *of the "
        "read alone* holds it against reading the dense tensor and doing nothing with it. And "
        "there are machines that write zeros faster than anything else: *of such data's fill "
        "alone* holds expand against filling the dense tensor with numbers as dense as what it "
        "writes.",
        "Torch selects and scatters without converting, so with unlike dtypes it takes a second "
        "pass over the values; so it does to accumulate. `index_copy_` onto zeros does less than "
        "expand: it relies on pruned entries being zero already.",
        "All results are held against the reference's, bit for bit, before the time is taken.",
        f"Two threads: bf16 dense tensors, f = {kernel_threads.DENSITY:g}, calls in a row for "
        f"{kernel_threads.TURN * 1e3:.0f} ms a turn. Busy: another process spins on one core. "
        "*Cores others used*: by the kernel's count of idle time, while this was measured. "
        f"No harm: a speed-up of at least {kernel_report.NO_HARM:g}, in the worst case. *Copy* and "
        "*fill with such data* are halves of the floors by two threads: where two cores get no "
        "more out of memory than one, two threads have nothing to gain.",
        f"Optimizer step: {steps[0].numel / 1e6:.1f}M parameters in matrices of a GPT of width "
        f"{steps[0].width}, AdamW with weight decay, from dense bf16 gradients to dense bf16 "
        "weights, zeros included. *Dense, fp32 mask on the weights*: gradient upcast to the fp32 "
        "`grad` of fp32 masters, `torch.optim.AdamW(fused=True)`, one fp32 multiplication of the "
        "masters by the mask, copy to bf16 (a bool mask or foreach would be slower). *Dense, bf16 "
        "mask on the gradient*: the bf16 gradient is multiplied by a bf16 mask instead, half the "
        "bytes. *Compact*: `kernels.pack` of the bf16 gradient into the fp32 `grad` of the values, "
        "`torch.optim.AdamW(fused=True)` on the values, `kernels.expand` into the bf16 weights. "
        "*All in torch*: the same with index_select (int32), zero_ and index_copy_ (int64). The "
        "first matrix's weights after all steps are held against plain AdamW in fp64.",
        f"A call on a small tensor: bf16, f = {kernel_calls.DENSITY:g}, everything in the caches.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def write(rows: list, options: argparse.Namespace, floors: Floors, origin: dict[str, str]) -> None:
    def of(kind: type[Row]) -> list[Row]:
        return [row for row in rows if isinstance(row, kind)]

    memory, kernel, threads = of(FloorRow), of(KernelRow), of(ThreadsRow)
    steps, calls = of(StepRow), of(CallRow)
    judged = kernel_report.verdicts(kernel, threads, steps)
    parts = [
        f"![fractions of what memory allows, and the optimizer step]({PLOT})",
        "## Targets",
        kernel_report.targets_table(judged),
        *kernel_report.kernel_parts(kernel),
        "## Two threads",
        kernel_report.threads_table(threads),
        "## Optimizer step",
        kernel_report.steps_table(steps),
        "## Small tensors",
        kernel_report.calls_table(calls),
        "## What memory allows",
        kernel_report.floors_table(memory),
        "## How to read it",
        notes(options, floors, steps),
    ]
    facts = {
        "settings": options.size | {"seed": options.seed},
        "floors": floors.about,
        "in use": ours()[0],
        "targets": [asdict(verdict) for verdict in judged],
        "memory": [asdict(row) for row in memory],
        "kernels": [asdict(row) for row in kernel],
        "threads": [asdict(row) for row in threads],
        "steps": [asdict(row) for row in steps],
        "calls": [asdict(row) for row in calls],
    }
    title = "Pack, expand and the optimizer step: times and what memory allows"
    results.write(options.out, NAME, facts, title, parts, origin)
    kernel_plot.draw(kernel, steps, options.out / PLOT)
    print("Targets" + (", which --quick cannot judge:" if options.quick else ":"))
    for verdict in judged:
        text, got, wanted, word = kernel_report.verdict_cells(verdict)
        print(f"  {word.strip('*')}: {text}: {got}, wanted {wanted}")


if __name__ == "__main__":
    sys.exit(main())
