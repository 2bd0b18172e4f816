"""Measures how long ``initialize`` takes with the block ``sparse_comm``, and without.

In each ZeRO stage two ranks start engines around copies of one pruned GPT in turn: dense, and
compact with masks from a file and from zeros. sparse_comm's own part is what its ``initialize``
does besides calling DeepSpeed's. Ends with status 1 if that is a second or more.
"""

import argparse
import sys
from dataclasses import asdict, dataclass

from rich.console import Console

from lib import deepspeed_run, results
from lib.bench import RANKS, Estimate, median, over_ranks
from lib.job import add_bar, progress_bars, run_job, run_script

NAME = "start"
WRITTEN = f"{NAME}.md and {NAME}.json"
DENSE = "dense"
SOURCES = ("a file", "from_zeros")  # of masks
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
        "--repeats", type=int, default=5, help="starts of each kind (default: %(default)s)"
    )
    deepspeed_run.add_gpt_arguments(parser)
    options = parser.parse_args()
    deepspeed_run.check_gpt_arguments(parser, options)
    if options.layers < 1:
        parser.error(f"--layers is {options.layers}; it must be 1 at least")
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs at least 2")
    deepspeed_run.prepare(parser)
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    settings = {key: vars(options)[key] for key in ("layers", "width", "density", "repeats")}
    settings["sides"] = {DENSE: None, SOURCES[0]: "", SOURCES[1]: SOURCES[1]}
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
