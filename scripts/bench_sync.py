"""Measures how long two ranks take to average the gradients of a pruned model.

The gradients of a GPT's matrices stand ready on two ranks (one thread each, gloo) and are averaged
in turn by: dense all-reduce in fp32 and bf16, PowerSGD, torch's sparse COO all-reduce, SAMO as
published, and sparse_comm, which packs bucket by bucket while the network carries the bucket
before. Over links of several speeds, between network namespaces (needs root) or on the loopback.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from lib import results, sync_plot, sync_report
from lib.bench import LOOPBACK, RANKS, check_links, link_name, run_over
from lib.job import add_bar, progress_bars, run_script
from lib.netns import LinkUnavailable
from lib.sync_rank import CONTEXT, SEQUENCES

NAME = "sync"
PLOT = f"{NAME}.png"
WRITTEN = f"{NAME}.md, {NAME}.json and {PLOT}"
DENSITIES = (0.1, 0.2)
PEERS = 3 + 5 * len(DENSITIES)
FULL = {"layers": 7, "width": 768, "repeats": 15}  # 49.5M entries
QUICK = {"layers": 2, "width": 256, "repeats": 3}


def main() -> int:
    options = parse_arguments()
    notes: list[str] = []
    try:
        return run_script(
            "The benchmark",
            options.out,
            WRITTEN,
            measure=lambda console: run_all(options, notes, console),
            write=lambda rows, origin: write(rows, options, notes, origin),
            is_wrong=lambda row: row.wrong,
            complaint="Not the average",
        )
    except LinkUnavailable as error:
        print(f"{error}; --links {LOOPBACK} works everywhere", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some ten minutes on two cores, and 5 GB of memory.",
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=["1gbit", "10gbit", LOOPBACK],
        metavar="LINK",
        help=f"{LOOPBACK}, or speeds as 'tc' writes them; those that this machine cannot make "
        "are left out (default: 1gbit 10gbit loopback)",
    )
    parser.add_argument(
        "--repeats", type=int, help=f"turns of each on each link (default: {FULL['repeats']})"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small gradients and few repeats: shows in a minute that everything works, but "
        "its times mean little",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / NAME,
        help=f"folder for the results (default: results/{NAME} of the checkout)",
    )
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    check_links(parser, options.links)
    if options.repeats is not None and options.repeats < 2:
        parser.error(f"--repeats is {options.repeats}; an interval needs at least 2")
    options.size = QUICK if options.quick else FULL
    if options.repeats is not None:
        options.size = options.size | {"repeats": options.repeats}
    return options


def run_all(options: argparse.Namespace, notes: list[str], console: Console) -> list:
    """The rows of all links; adds to the notes what a reader needs to know about them."""
    rows: list[sync_report.Row] = []
    missing: LinkUnavailable | None = None
    job = options.size | {"densities": DENSITIES, "seed": options.seed}
    with progress_bars(console) as progress:
        for link in options.links:
            total = PEERS * (1 + job["repeats"])
            on_progress = add_bar(progress, f"gradient sync, {link_name(link)}", total)
            try:
                ranks, counted = run_over(link, "lib.sync_rank", job, on_progress)
            except LinkUnavailable as error:
                missing = error
                notes.append(f"{link_name(link)} was not measured: {error}.")
                console.print(notes[-1], markup=False)
                continue
            if not rows:
                notes.insert(0, about(job, ranks[0]))
            notes.append(f"{link_name(link)}: {measured_link(ranks[0])}. MB counted: {counted}.")
            rows += sync_report.rows_of(link, ranks)
    if missing and not rows:
        raise missing
    return rows


def about(job: dict, rank: dict) -> str:
    return (
        f"{RANKS} ranks, one thread each, gloo. The gradients are those of {rank['layers']} "
        f"matrices of a GPT ({job['layers']} blocks of width {job['width']}), "
        f"{rank['entries'] / 1e6:.1f}M entries, of its first backward pass over {SEQUENCES} × "
        f"{CONTEXT} bytes of text a rank; the masks keep the largest weights of each matrix."
    )


def measured_link(rank: dict) -> str:
    link = rank["link"]
    return (
        f"`measure_link` found {link['latency_s'] * 1e3:.2f} ms and "
        f"{link['bytes_per_s'] / 1e6:.0f} MB/s, from which sparse_comm's buckets follow"
    )


NOTES = (
    "ms: from when the dense gradients stand ready on both ranks to when the slower rank has the "
    "sum of all, packing included. Medians of the turns with 95 % bootstrap intervals; ratios are "
    "of medians over the same turns. All take turns in one pair of processes per link, in an "
    "order that changes from turn to turn.",
    "Dividing by the number of ranks is left out everywhere but in PowerSGD's hook, and so is "
    "expanding: what follows is an optimizer step on what was reduced.",
    "MB by the formula: what a rank has to send. MB counted: what was sent, headers of TCP "
    "included, as far as the interface sees them (one a super-packet, not one a packet).",
    "The speed of a link is a token bucket's of 256 KB: that much passes at once after a pause.",
    "relative error: of the averages against exact averages of the fp32 gradients, of what is "
    "reduced (the unpruned entries, or all). PowerSGD's is that of its first step: error feedback "
    "makes up for a part of it in later steps, and gradients of so few tokens have low rank.",
    "dense: buckets of 25 MB, all handed over at once. SAMO: int32 index, `index_select` layer by "
    "layer, then one collective a layer; its gradients are bf16, and its paper's collective is "
    "half-precision; with an fp32 collective they are converted first. COO: fp32, one collective "
    "a layer. PowerSGD: torch's hook, one bucket, timed from DDP's call of the hook on.",
    "The byte limit: f times the time of dense bf16.",
)


def write(
    rows: list[sync_report.Row],
    options: argparse.Namespace,
    notes: list[str],
    origin: dict[str, str],
) -> None:
    judged = sync_report.verdicts(rows)
    facts = {
        "settings": options.size | {"densities": DENSITIES, "seed": options.seed},
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    title = "Gradient sync: time and bytes until gradients are averaged"
    texts = [*notes, *NOTES]
    results.write(options.out, NAME, facts, title, sync_report.markdown(rows, PLOT, texts), origin)
    sync_plot.draw(rows, options.out / PLOT)
    print("Targets" + (", which --quick cannot judge:" if options.quick else ":"))
    for verdict in judged:
        link, text, got, wanted, reached = sync_report.verdict_cells(verdict)
        print(f"  {reached.strip('*')}: {link}, {text}: {got}, wanted {wanted}")


if __name__ == "__main__":
    sys.exit(main())
