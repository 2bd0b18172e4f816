"""Measures how long ``initialize`` takes with the block ``sparse_comm``, and without.

In each ZeRO stage two ranks start engines around copies of one pruned GPT in turn: dense, and
compact with masks from a file and from zeros. sparse_comm's own part is what its ``initialize``
does besides calling DeepSpeed's. Ends with status 1 if that is a second or more.
"""

import argparse
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from lib import results
from lib.bench import RANKS, Estimate, median, over_ranks
from lib.job import add_bar, progress_bars, run_job, run_script
from lib.start_rank import DENSE, SOURCES

NAME = "start"
WRITTEN = f"{NAME}.md and {NAME}.json"
LIMIT = 1.0  # s


@dataclass(frozen=True)
class Row:
    """Starts of one kind; seconds of the slower rank."""

    stage: int
    masks: str  # or that it is dense
    parameters: int
    whole: Estimate
    own: Estimate | None  # without DeepSpeed's part; None if dense

    @property
    def wrong(self) -> bool:
        return self.own is not None and self.own.value >= LIMIT


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The measurement",
        options.out,
        WRITTEN,
        measure=lambda console: run_all(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: row.wrong,
        complaint=f"Takes {LIMIT:g} s or more",
        packages=("deepspeed",),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some three minutes on two cores, and 6 GB of memory.",
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=2,
        help="transformer blocks (default: %(default)s: 100M parameters)",
    )
    parser.add_argument(
        "--width", type=int, default=2048, help="of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--density", type=float, default=0.1, help="of matrices (default: %(default)s)"
    )
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=range(4), default=[0, 1, 2, 3], help="of ZeRO"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="starts of each kind (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "deepspeed",
        help="folder for the results (default: results/deepspeed of the checkout)",
    )
    options = parser.parse_args()
    if options.width % 64 or options.width < 64:
        parser.error(f"--width is {options.width}; it must be a multiple of 64, such as 2048")
    if not 0 < options.density < 1:
        parser.error(f"--density is {options.density}; it must lie between 0 and 1")
    if options.layers < 1:
        parser.error(f"--layers is {options.layers}; it must be 1 at least")
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs at least 2")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    settings = {key: vars(options)[key] for key in ("layers", "width", "density", "repeats")}
    rows = []
    with progress_bars(console) as progress:
        for stage in options.stages:
            bar = add_bar(progress, f"ZeRO {stage}", options.repeats * (1 + len(SOURCES)))
            ranks = run_job("lib.start_rank", settings | {"stage": stage}, RANKS, bar)
            rows += [row_of(stage, masks, ranks) for masks in (DENSE, *SOURCES)]
    return rows


def row_of(stage: int, masks: str, ranks: list[dict]) -> Row:
    turns = [rank["sides"][masks] for rank in ranks]
    own = None
    if masks != DENSE:
        own = median([max(each) for each in zip(*(turn["own"] for turn in turns), strict=True)])
    whole = median(over_ranks(turns, "lo")["seconds"])
    return Row(stage, masks, ranks[0]["parameters"], whole, own)


def write(rows: list[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    head = ("ZeRO", "masks", "initialize, s", "sparse_comm's part, s")
    lines = [
        (str(row.stage), row.masks, row.whole.text(2), "–" if row.own is None else row.own.text(2))
        for row in rows
    ]
    notes = [
        f"- A GPT of {rows[0].parameters / 1e6:.1f}M parameters in bf16, its matrices at density "
        f"{options.density:g}; {RANKS} ranks over the loopback, one thread each; torch's AdamW.",
        f"- Medians of {options.repeats} starts in turn, of the slower rank, with 95 % bootstrap "
        "intervals. *dense*: no block, which is `deepspeed.initialize`.",
        "- sparse_comm's part: reading or finding the masks, comparing them between ranks, packing "
        f"the values, and watching the engine; wanted: below {LIMIT:g} s.",
        "- A dense start before all is not counted: a process's first start, dense or compact, "
        "imports torch's compiler, for a second.",
    ]
    title = "What initialize takes"
    parts = [results.markdown_table(head, lines, texts=2), "\n".join(notes)]
    facts = {
        "settings": {key: vars(options)[key] for key in ("layers", "width", "density", "repeats")},
        "rows": [asdict(row) for row in rows],
    }
    results.write(options.out, NAME, facts, title, parts, origin)


if __name__ == "__main__":
    sys.exit(main())
