"""Measures whole training steps of a pruned GPT on two ranks, and the losses they reach.

From one pruned start, on equal batches of text and in turn, it trains: masked dense under DDP in
fp32, in bf16 and by PowerSGD; with torch's sparse COO all-reduce; by SAMO as published; and
compact, by sparse_comm. Two ranks (one thread each, gloo), joined by a link of 1 Gbit/s between
network namespaces (needs root) and by the loopback. All compute in fp32, then all in bf16 where the
processor is faster in it. Before, on one process and with nothing to send, it measures what
compaction itself costs.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from lib import results, step_plot, step_report
from lib.bench import LOOPBACK, RANKS, check_links, link_name, run_over
from lib.job import add_bar, progress_bars, run_job, run_script
from lib.netns import LinkUnavailable
from lib.pair import BLOCK, UNTIMED
from lib.step_kinds import COMPUTE_BF16, COMPUTE_FP32, KINDS, ROUNDING
from lib.step_one import SIDES
from lib.step_one import UNTIMED as UNTIMED_ALONE
from lib.step_peers import LEARNING_RATE, WEIGHT_DECAY
from lib.step_report import FINAL_STEPS, Cost, Row
from lib.step_start import CONTEXT, SIZE

NAME = "step"
PLOT = f"{NAME}.png"
WRITTEN = f"{NAME}.md, {NAME}.json and {PLOT}"
FULL = {"layers": 9, "width": 512, "warm_up": 40, "steps": 40, "repeats": 15, "tokens": 64}
QUICK = {"layers": 2, "width": 256, "warm_up": 4, "steps": 5, "repeats": 2, "tokens": 16}


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
            complaint="Not the same training",
        )
    except LinkUnavailable as error:
        print(f"{error}; --links {LOOPBACK} works everywhere", file=sys.stderr)
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some 20 minutes on two cores, and 10 GB of memory.",
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=["1gbit", LOOPBACK],
        metavar="LINK",
        help=f"{LOOPBACK}, or speeds as 'tc' writes them; those that this machine cannot make "
        f"are left out (default: 1gbit {LOOPBACK})",
    )
    parser.add_argument(
        "--density",
        nargs="+",
        type=float,
        default=[0.1],
        metavar="F",
        help="unpruned parameters over all, those without a mask included (default: 0.1)",
    )
    parser.add_argument(
        "--compute",
        nargs="+",
        choices=tuple(ROUNDING),
        default=[COMPUTE_FP32, *([COMPUTE_BF16] if is_fast_in_bf16() else [])],
        help="fp32, or bf16 by torch.autocast with fp32 masters (default: fp32, and bf16 if the "
        "processor has instructions for it)",
    )
    steps, tokens = FULL["steps"], FULL["tokens"]
    parser.add_argument("--steps", type=int, help=f"of each training (default: {steps})")
    parser.add_argument(
        "--tokens",
        type=int,
        help="of each rank and step, in one sequence; the more, the less the network counts "
        f"(default: {tokens})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a small model and few steps: shows in a minute that everything works, but its "
        "times mean nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / NAME,
        help=f"folder for the results (default: results/{NAME} of the checkout)",
    )
    options = parser.parse_args()
    check(parser, options)
    given = {name: vars(options)[name] for name in ("steps", "tokens") if vars(options)[name]}
    options.size = (QUICK if options.quick else FULL) | given | {"seed": options.seed}
    return options


def is_fast_in_bf16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot work before any process starts."""
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    check_links(parser, options.links)
    for density in options.density:
        least = 0.1 if options.quick else 0.02  # embeddings, biases and norms have no mask
        if not least <= density < 1:
            parser.error(f"--density has {density}; it must be at least {least} and below 1")
    if options.steps is not None and options.steps < UNTIMED + 2:
        parser.error(
            f"--steps is {options.steps}; the first {UNTIMED} are not timed, and an interval "
            "needs 2"
        )
    if options.tokens is not None and not 1 <= options.tokens <= CONTEXT:
        parser.error(f"--tokens is {options.tokens}; it must be from 1 to {CONTEXT}")


def run_all(options: argparse.Namespace, notes: list[str], console: Console) -> list:
    """All rows and costs; adds to the notes what a reader needs to know about them."""
    measured: list[Row | Cost] = []
    missing: LinkUnavailable | None = None
    with (
        tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder,
        progress_bars(console) as progress,
    ):
        job = options.size | {"start": str(Path(folder) / "warm.pt")}
        job["computes"] = options.compute
        measured += run_alone(job, options.density, progress)
        for link in options.links:
            try:
                measured += run_link(link, job, options.density, notes, progress)
            except LinkUnavailable as error:
                missing = error
                notes.append(f"{link_name(link)} was not measured: {error}.")
                console.print(notes[-1], markup=False)
    if missing and all(isinstance(row, Cost) for row in measured):
        raise missing
    return measured


def run_alone(job: dict, densities: Sequence[float], progress: Progress) -> list[Cost]:
    """The warm-up that files ``job["start"]``, and the costs on one process."""
    turns = len(densities) * len(job["computes"]) * SIDES * (UNTIMED_ALONE + job["repeats"])
    on_progress = add_bar(progress, "warm-up, then one process", job["warm_up"] + turns)
    [result] = run_job("lib.step_one", job | {"densities": densities}, 1, on_progress)
    return [cost for section in result["sections"] for cost in step_report.costs_of(section)]


def run_link(
    link: str, job: dict, densities: Sequence[float], notes: list[str], progress: Progress
) -> list[Row]:
    """The rows of one link."""
    rows = []
    counted = ""
    for density, compute in product(densities, job["computes"]):
        section = (link, density, compute)
        on_progress = add_bar(progress, step_report.title_of(section), len(KINDS) * job["steps"])
        of_this = job | {"density": density, "compute": compute}
        ranks, counted = run_over(link, "lib.step_rank", of_this, on_progress)
        if not notes:
            notes.append(about(job, ranks[0]))
        rows += step_report.rows_of(section, ranks)
    notes.append(f"MB counted, {link_name(link)}: {counted}; a step's, mean over blocks.")
    return rows


def about(job: dict, rank: dict) -> str:
    return (
        f"{RANKS} ranks, one thread each, gloo. A GPT of {job['layers']} blocks of width "
        f"{job['width']}, {rank['parameters'] / 1e6:.2f}M parameters, reads bytes of Python's "
        f"standard library, 1 × {job['tokens']} a rank and step: so few that the network is what "
        "costs. With more of them a step computes longer, and all trainings come closer to one "
        f"another. It was trained for {job['warm_up']} dense steps on one process ({SIZE} × "
        f"{CONTEXT} bytes each), then pruned by magnitude: f counts embeddings, biases and norms, "
        f"which have no mask. Held-out loss of the pruned start: {rank['start_loss']:.4f}."
    )


NOTES = (
    f"All step with fused AdamW on fp32 weights (learning rate {LEARNING_RATE:g}, weight decay "
    f"{WEIGHT_DECAY:g}); they differ in what is sent and stored. Computing in bf16: under "
    "torch.autocast, which rounds dense weights in each forward; sparse_comm with "
    "compute_dtype=torch.bfloat16, which expands fp32 values straight to bf16 weights.",
    f"Steps of one training come in blocks of {BLOCK}, in an order of trainings that changes from "
    f"block to block; the first {UNTIMED} of a block are not timed. All trainings see the same "
    "batches. step: of the slower rank; medians with 95 % bootstrap intervals; ratios are of "
    "medians, resampled in pairs of equal batches.",
    "forward, backward, exposed, optimizer and masks: medians, in ms, of the rank whose gradients "
    "are ready last. exposed: what the step waits for, from when all gradients but the "
    "embeddings' are computed to when all are averaged, DDP's own finishing, PowerSGD's "
    "arithmetic and what COO does to the reduced gradients included.",
    "dense: DDP; after each step weights are multiplied by fp32 masks. dense bf16: the hook of "
    "sparse_comm.reduce, with DDP's default buckets of 25 MiB of fp32 gradients, or with the size "
    "chosen for the measured link, as ours has; ratios are against the better of the two. "
    "PowerSGD: torch's hook, one bucket; its first two steps, untimed, are uncompressed.",
    "COO: fp32, indices of int64, one collective a matrix after backward; then dense AdamW, which "
    "needs no masks. SAMO: int32 index, compressed in backward, one collective a matrix after "
    "backward, AdamW on compressed tensors, expansion in its step; its weights and gradients are "
    "fp32 here, which autocast rounds as it does the dense ones, and the bf16 collective "
    "converts.",
    "sparse_comm: cached unless it says transient. Cached weights are expanded in forward, "
    "transient ones in forward and again in backward; both pack in backward.",
    f"last losses: mean of the last {FINAL_STEPS} steps (or of all, if fewer). largest |Δloss|: "
    "over all steps, against dense of the same precision on the wire.",
    f"One process: {SIZE} × {CONTEXT} bytes a step, step by step in turn, one thread. Masked "
    "dense is timed as above; *adds to dense without masks* leaves its multiplication by masks "
    "out. pack, expand: time in these kernels, of forward and backward.",
)


def write(
    measured: Sequence[Row | Cost],
    options: argparse.Namespace,
    notes: list[str],
    origin: dict[str, str],
) -> None:
    rows = [row for row in measured if isinstance(row, Row)]
    costs = [row for row in measured if isinstance(row, Cost)]
    judged = step_report.verdicts(rows, costs)
    facts = {
        "settings": options.size | {"densities": options.density, "computes": options.compute},
        "notes": notes,
        "targets": [asdict(verdict) for verdict in judged],
        "one_process": [asdict(cost) for cost in costs],
        "rows": [asdict(row) for row in rows],
    }
    title = "Whole training steps: time, bytes and losses"
    notes = [*notes, *step_report.limits(rows), *NOTES]
    parts = step_report.markdown(rows, costs, PLOT, notes)
    results.write(options.out, NAME, facts, title, parts, origin)
    step_plot.draw(rows, costs, options.out / PLOT)
    print("Targets" + (", which --quick cannot judge:" if options.quick else ":"))
    for verdict in judged:
        where, text, got, wanted, reached = step_report.verdict_cells(verdict)
        print(f"  {reached.strip('*')}: {where}, {text}: {got}, wanted {wanted}")


if __name__ == "__main__":
    sys.exit(main())
