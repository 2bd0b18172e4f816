"""Measures which dense weights are alive after forward and during backward.

In transient mode a dense weight exists only while its layer runs. This counts the bytes of dense
weights (and, in backward, dense gradients) that are alive, for plain dense parameters and both
storage modes of compact ones: in eager mode, under autocast, with activation checkpointing,
compiled, and under FSDP2 on two ranks. Ends with status 1 if a transient row is above the limit:
the two largest layers after forward, and the weight and the gradient of one layer in backward.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from lib import results
from lib.job import add_bar, progress_bars, run_job, run_script
from lib.live_bytes_rank import CONTEXT, RUNS, Case, Weights

LIMIT = 2.0  # largest layers
MODES: tuple[Weights, ...] = ("dense", "cached", "transient")
FSDP2 = "FSDP2, 2 ranks"


@dataclass(frozen=True)
class Row:
    """Bytes of dense weights in one process; of several ranks, the largest of each."""

    run: str
    weights: str
    largest_layer: int
    resident: int
    after_forward: int
    after_forward_by_storages: int | None
    peak_in_forward: int
    peak_in_backward: int
    most_at_once_in_backward: int

    @property
    def as_expected(self) -> bool:
        """Whether a transient row is within the limits; others have none."""
        if self.weights != "transient":
            return True
        after = max(self.after_forward, self.after_forward_by_storages or 0)
        limit = LIMIT * self.largest_layer
        return after <= limit and self.peak_in_backward <= limit


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The measurement",
        options.out,
        "live_bytes.md and live_bytes.json",
        measure=lambda console: run_all(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: not row.as_expected,
        complaint="Above the limit",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes live_bytes.md and live_bytes.json. Takes some two minutes on two cores.",
    )
    parser.add_argument(
        "--layers", type=int, default=3, help="transformer blocks (default: %(default)s)"
    )
    parser.add_argument(
        "--width",
        type=int,
        default=256,
        help="of the model, a multiple of 64 (default: %(default)s)",
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.05,
        help="fraction of each masked weight that is unpruned; at most 0.08, so that the values of "
        "a block are fewer than the entries of its smallest weight (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "live_bytes",
        help="folder for the results (default: results/live_bytes of the checkout)",
    )
    options = parser.parse_args()
    if options.width % 64 or options.width < 256:
        parser.error(f"--width is {options.width}; it must be a multiple of 64, 256 at least")
    if not 0 < options.density <= 0.08:
        parser.error(f"--density is {options.density}; it must be above 0 and at most 0.08")
    if options.layers < 2:
        parser.error(f"--layers is {options.layers}; at least 2 are needed to tell layers apart")
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    cases = [
        Case(run, weights)
        for run in RUNS
        for weights in MODES
        if weights != "dense" or not run.endswith("compute_dtype")
    ]
    settings = {key: vars(options)[key] for key in ("layers", "width", "density")}
    rows = []
    with progress_bars(console) as progress:
        for name, ranks in (("one process", 1), (FSDP2, 2)):
            part = [case for case in cases if (case.run == FSDP2) == (ranks == 2)]
            on_progress = add_bar(progress, name, total=len(part))
            job = settings | {"ranks": ranks, "cases": [asdict(case) for case in part]}
            found = run_job("lib.live_bytes_rank", job, ranks, on_progress)
            for index, case in enumerate(part):
                rows.append(row_of(case, [rank["cases"][index] for rank in found]))
    return rows


def row_of(case: Case, ranks: list[dict]) -> Row:
    counts = [rank["storages after forward"] for rank in ranks]
    most = {key: max(r["allocator"][key] for r in ranks) for key in ranks[0]["allocator"]}
    return Row(
        case.run,
        case.weights,
        ranks[0]["largest layer"],
        max(rank["resident"] for rank in ranks),
        most["after forward"],
        None if None in counts else max(counts),
        most["peak in forward"],
        most["peak in backward"],
        max(rank["most at once in backward"] for rank in ranks),
    )


def write(rows: list[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    head = ["run", "weights", "resident", "after forward", "counted by storages"]
    head += ["peak in forward", "peak in backward", "most at once"]
    table = results.markdown_table(head, [_cells(row) for row in rows], texts=2)
    settings = {key: vars(options)[key] for key in ("layers", "width", "density")}
    megabytes = rows[0].largest_layer / 1e6
    notes = [
        f"Bytes of dense weights and, in backward, of their dense gradients, in units of the "
        f"largest layer's fp32 weight ({megabytes:.2f} MB). A transient model should have at most "
        f"{LIMIT:.0f} after forward, and in backward the weight and the gradient of one layer: "
        f"{LIMIT:.0f} again.",
        f"A GPT of {options.layers} blocks and width {options.width}, one sequence of {CONTEXT} "
        f"tokens, random masks of density {options.density:g} on all matrices but the position "
        "embedding. Only tensors at least as large as the smallest masked weight count (in bf16 "
        "under autocast), and nothing but dense weights, their copies and gradients is that large.",
        "*Resident*: parameters or caches, there all the time (under FSDP2 the rank's shards). The "
        "columns after it hold it, too.",
        "*After forward* and the peaks are from the record of torch's CPU allocator "
        "(`torch.profiler`, `profile_memory=True`), which sees autograd, compiled code and FSDP2 "
        "as well. *Counted by storages* is an independent count: weak references to the storage "
        "of every large tensor that an operator gave (`TorchDispatchMode`) and that is still "
        "alive; of compiled code, the tensors that its autograd node saved; and what is resident.",
        "*Most at once*: how many large tensors were alive together in backward, resident ones "
        "apart; 2 are the weight and the gradient of one layer.",
        "A dense model has all of its dense gradients at the end of backward. Under FSDP2 the "
        "dense model's counts differ between runs (after forward 4.75 to 7.76, in backward 19 to "
        "24 were seen).",
        "*Cached* under FSDP2 keeps no cache (nothing resident): weights are expanded at each use, "
        "and autograd keeps them until backward. Use *transient* there. Compiled with aot_eager, a "
        "backend for debugging, *cached* holds a second copy of the caches from forward to "
        "backward; with inductor it does not.",
    ]
    results.write(
        options.out,
        "live_bytes",
        {"settings": settings, "rows": [asdict(row) for row in rows]},
        "Live dense bytes",
        [table, "## How to read it", "\n".join(f"- {note}" for note in notes)],
        origin,
    )


def _cells(row: Row) -> tuple[str, ...]:
    sizes = (
        row.resident,
        row.after_forward,
        row.after_forward_by_storages,
        row.peak_in_forward,
        row.peak_in_backward,
    )
    cells = ["–" if size is None else f"{size / row.largest_layer:.2f}" for size in sizes]
    return (row.run, row.weights, *cells, str(row.most_at_once_in_backward))


if __name__ == "__main__":
    sys.exit(main())
