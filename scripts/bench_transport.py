"""Measures messages between AxoNN's pipeline stages over torch.distributed, on the loopback.

How many bytes a second the transport carries, against gloo's own send and recv of the same sizes;
and what the engine adds to a micro-batch's messages, on stages that compute next to nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from lib import bench, results
from lib.bench import LOOPBACK, Estimate, run_over
from lib.job import add_bar, progress_bars, run_script
from lib.transport_kinds import BYTES, ENGINE, NOTHING, OURS, RAW, SIDES
from lib.verdict import Verdict

RATE_TARGET = 0.8  # of raw gloo's, at least
OVERHEAD_TARGET = 1e-3  # s a message, at most
NAME = "transport"


@dataclass(frozen=True)
class Row:
    """Messages of one size."""

    nbytes: int
    raw: Estimate  # bytes a second
    ours: Estimate
    share: Estimate  # ours over raw

    @property
    def wrong(self) -> bool:
        return False


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The benchmark",
        options.out,
        f"{NAME}.md and {NAME}.json",
        measure=lambda console: measure(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: False,
        complaint="",
        packages=("axonn",),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="of each (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="few repeats: shows that everything works"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "axonn",
        help="folder for the results (default: results/axonn of the checkout)",
    )
    options = parser.parse_args()
    if find_spec("axonn") is None:
        parser.error("AxoNN is not installed here: run bash scripts/setup_env.sh axonn")
    if options.quick:
        options.repeats = 3
    if options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs 2")
    return options


def measure(options: argparse.Namespace, console: Console) -> list[Row]:
    with progress_bars(console) as progress:
        turns = options.repeats * (len(BYTES) * len(SIDES) + 2)
        on_progress = add_bar(progress, "two ranks, loopback", turns)
        job = {"repeats": options.repeats}
        ranks, _ = run_over(LOOPBACK, "lib.transport_rank", job, on_progress)
    rows = []
    for nbytes in BYTES:
        seconds = {side: _slower(ranks, f"{side} {nbytes}") for side in SIDES}
        volume = nbytes * ranks[0]["counts"][str(nbytes)]
        raw, ours = (
            bench.median([volume / second for second in seconds[side]]) for side in (RAW, OURS)
        )
        rows.append(Row(nbytes, raw, ours, bench.ratio(seconds[RAW], seconds[OURS])))
    engine, nothing = (_slower(ranks, side) for side in (ENGINE, NOTHING))
    messages = ranks[0]["messages"]
    each = [(a - b) / messages for a, b in zip(engine, nothing, strict=True)]
    options.overhead = bench.median(each)
    return rows


def _slower(ranks: Sequence[dict], side: str) -> list[float]:
    return [max(both) for both in zip(*(rank["turns"][side] for rank in ranks), strict=True)]


def verdicts(rows: Sequence[Row], overhead: Estimate) -> list[Verdict]:
    least = min(rows, key=lambda row: row.share.value)
    return [
        Verdict(
            "loopback",
            f"throughput over that of gloo's send and recv, least of all sizes "
            f"({least.nbytes >> 10} KiB)",
            least.share.text(2),
            f"at least {RATE_TARGET}",
            least.share.value >= RATE_TARGET,
        ),
        Verdict(
            "loopback",
            "what the engine adds to a message, ms",
            overhead.text(3, scale=1e-3),
            f"at most {OVERHEAD_TARGET * 1e3:g}",
            overhead.value <= OVERHEAD_TARGET,
        ),
    ]


NOTES = (
    "Two ranks, one thread each, gloo over the loopback, in a network namespace of their own where "
    "that is possible.",
    f"{RAW}: `dist.send` and `dist.recv`, message after message. {OURS}: the transport's `send` "
    "and `receive` in the same order, each waited for as the engine does. Both send in one "
    "direction; a turn ends when all have arrived. Medians with 95 % bootstrap intervals; ratios "
    "are of medians, resampled in pairs.",
    "What the engine adds: a step of two stages of one 8 × 8 matrix each, less the same work in a "
    "plain loop in one process, over the messages of a step: an activation and a gradient a "
    "micro-batch, of which there are 64. It holds the messages' latency, and the time to fill it.",
)


def write(rows: Sequence[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    judged = verdicts(rows, options.overhead)
    head = ("message", f"{RAW}, GB/s", f"{OURS}, GB/s", "ours / raw")
    cells = [
        [
            f"{row.nbytes >> 10} KiB",
            row.raw.text(2, scale=1e9),
            row.ours.text(2, scale=1e9),
            row.share.text(2),
        ]
        for row in rows
    ]
    parts = [
        results.markdown_table(head, cells),
        f"What the engine adds to a message: {options.overhead.text(3, scale=1e-3)} ms.",
        "\n".join(f"- {verdict.sentence()}" for verdict in judged),
        "\n".join(f"- {note}" for note in NOTES),
    ]
    facts = {
        "rows": [asdict(row) for row in rows],
        "overhead_s": asdict(options.overhead),
        "targets": [asdict(verdict) for verdict in judged],
    }
    results.write(options.out, NAME, facts, "Messages between pipeline stages", parts, origin)
    for verdict in judged:
        print(verdict.sentence(mark=""))


if __name__ == "__main__":
    sys.exit(main())
