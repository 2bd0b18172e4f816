"""Compares one pruned GPT's training in a framework, dense and compact: bytes, time and losses.

All sides train from one pruned start, on equal batches and in turn, on ranks with one thread each
(gloo) that compute in bf16, joined by a link of 1 Gbit/s between network namespaces (needs root)
and by the loopback. Losses are compared with masked dense training, whose gradients are masked.

DeepSpeed: in each ZeRO stage, engines of one config. Times are compared with dense training, which
nothing masks; compact training is sparse_comm's, with cached weights (not in stage 3) and with
transient ones.

AxoNN: on grids of pipeline stages and replicas, AxoNN's own reduction of gradients, buckets without
and with overlap, and compact training; with the phases of a step, as in SAMO's Figure 8.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from lib import compare_plot, compare_report, deepspeed_run, results
from lib.bench import LOOPBACK, RANKS, check_links, link_name, run_over
from lib.compare_report import Row
from lib.compare_run import possible, warm_up
from lib.job import add_bar, progress_bars, run_script
from lib.netns import LinkUnavailable
from lib.pair import BLOCK, UNTIMED
from lib.step_peers import LEARNING_RATE, WEIGHT_DECAY
from lib.step_report import FINAL_STEPS
from lib.step_start import CONTEXT, SIZE

DEEPSPEED, AXONN = "deepspeed", "axonn"
FRAMEWORKS = (DEEPSPEED, AXONN)
GRIDS = ("1x2", "2x1", "2x2")
STAGES = (0, 1, 2, 3)
DENSITY = 0.1  # unpruned parameters over all, those without a mask included
LINKS = ("1gbit", LOOPBACK)
FULL = {"layers": 9, "width": 512, "warm_up": 40, "steps": 40, "tokens": 64}
QUICK = {"layers": 2, "width": 256, "warm_up": 4, "steps": 5, "tokens": 16}


@dataclass(frozen=True)
class Plan:
    """What to compare, and where to write it."""

    stages: Sequence[int]
    links: Sequence[str]
    size: dict[str, int]  # of model and training, as FULL, and the seed
    out: Path
    name: str  # of the files
    judge_times: bool  # whether the targets of times are for this size

    @property
    def plot(self) -> str:
        return f"{self.name}.png"

    @property
    def written(self) -> str:
        return f"{self.name}.md, {self.name}.json and {self.plot}"


def main() -> int:
    options = parse_arguments()
    given = {"seed": options.seed} | ({"steps": options.steps} if options.steps else {})
    out = options.out or results.FOLDER / options.framework
    links = list(dict.fromkeys(options.links))
    if options.framework == AXONN:
        from lib import axonn_compare

        size = (axonn_compare.QUICK if options.quick else axonn_compare.FULL) | given
        grids = list(dict.fromkeys(options.grids))
        return axonn_compare.compare(
            axonn_compare.Plan(grids, links, size, out, "compare", not options.quick)
        )
    size = (QUICK if options.quick else FULL) | given
    stages = sorted(set(options.stages))
    return compare(Plan(stages, links, size, out, "compare", not options.quick))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes compare.md, compare.json and compare.png. Takes some 15 minutes on two "
        "cores, and 4 GB of memory (AxoNN: 8).",
    )
    parser.add_argument(
        "--framework",
        choices=FRAMEWORKS,
        default=DEEPSPEED,
        help="that trains (default: %(default)s)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=STAGES,
        default=[1, 2, 3],
        metavar="STAGE",
        help="DeepSpeed: of ZeRO, 0 to 3 (default: 1 2 3)",
    )
    parser.add_argument(
        "--grids",
        nargs="+",
        type=grid,
        default=[grid(name) for name in GRIDS],
        metavar="GRID",
        help="AxoNN: pipeline stages x replicas, as 2x1; an even number of ranks "
        f"(default: {' '.join(GRIDS)})",
    )
    parser.add_argument(
        "--links",
        nargs="+",
        default=LINKS,
        metavar="LINK",
        help=f"{LOOPBACK}, or speeds as 'tc' writes them; those that this machine cannot make "
        f"are left out (default: {' '.join(LINKS)})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of each training (default: {FULL['steps']}; AxoNN: 16)",
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
        help="folder for the results (default: the framework's in results of the checkout)",
    )
    options = parser.parse_args()
    check_machine(parser, options.framework)
    check_links(parser, options.links)
    if options.steps is not None and options.steps < UNTIMED + 2:
        parser.error(
            f"--steps is {options.steps}; the first {UNTIMED} are not timed, and an interval "
            "needs 2"
        )
    return options


def grid(text: str) -> tuple[int, int]:
    """Of an argument such as 2x1."""
    stages, _, replicas = text.partition("x")
    sizes = int(stages), int(replicas)
    if min(sizes) < 1 or sizes[0] * sizes[1] % 2:
        raise ValueError
    return sizes


def check_machine(parser: argparse.ArgumentParser, framework: str) -> None:
    """Refuse what cannot work before any process starts."""
    if sys.platform != "linux":
        parser.error(f"this script needs Linux; this is {sys.platform}")
    if framework == DEEPSPEED:
        deepspeed_run.prepare(parser)
    elif find_spec(framework) is None:
        parser.error("AxoNN is not installed here: run bash scripts/setup_env.sh axonn")


def compare(plan: Plan) -> int:
    """Measure, and write the report; returns the exit status."""
    notes: list[str] = []
    try:
        return run_script(
            "The comparison",
            plan.out,
            plan.written,
            measure=lambda console: run_all(plan, notes, console),
            write=lambda rows, origin: write(rows, plan, notes, origin),
            is_wrong=lambda row: row.wrong,
            complaint="Not the same training",
            packages=(DEEPSPEED,),
        )
    except LinkUnavailable as error:
        print(f"{error}; --links {LOOPBACK} works everywhere", file=sys.stderr)
        return 1


def run_all(plan: Plan, notes: list[str], console: Console) -> list[Row]:
    """All rows; adds to the notes what a reader needs to know about them."""
    links = possible(plan.links, notes, console)
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder,
        progress_bars(console) as progress,
    ):
        job = plan.size | {"start": str(Path(folder) / "warm.pt"), "density": DENSITY}
        warm_up(job, progress)
        for link in links:
            for stage in plan.stages:
                ranks, counted = run_stage(link, stage, job, progress)
                if not rows:
                    notes.insert(0, about(job, ranks[0]))
                rows += compare_report.rows_of(link, stage, ranks)
            notes.append(f"MB sent, {link_name(link)}: {counted}; a step's, mean over blocks.")
    return rows


def run_stage(link: str, stage: int, job: dict, progress: Progress) -> tuple[list[dict], str]:
    """What the ranks measured, and what their counters of bytes count."""
    turns = len(compare_report.sides_of(stage)) * job["steps"]
    on_progress = add_bar(progress, compare_report.title_of(link, stage), turns)
    return run_over(link, "lib.compare_rank", job | {"stage": stage}, on_progress)


def about(job: dict, rank: dict) -> str:
    return (
        f"{RANKS} ranks, one thread each, gloo, both on this machine: the slow link between them "
        f"is emulated. A GPT of {job['layers']} blocks of width {job['width']}, "
        f"{rank['parameters'] / 1e6:.2f}M parameters, reads bytes of Python's standard library, "
        f"1 × {job['tokens']} a rank and step: so few that the network is what costs. It was "
        f"trained for {job['warm_up']} dense steps on one process ({SIZE} × {CONTEXT} bytes each), "
        f"then pruned by magnitude to f = {rank['unpruned'] / rank['parameters']:.4f}, which "
        "counts embeddings, biases and norms, too; they have no mask. Held-out loss of the pruned "
        f"start, in fp32: {rank['start_loss']:.4f}."
    )


NOTES = (
    "All sides of a stage have one DeepSpeed config (bf16, no clipping, no parameter too small to "
    "be partitioned by ZeRO 3, else its defaults) and step with torch's fused AdamW on fp32 "
    f"masters (learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}).",
    "dense: nothing is masked, so its pruned weights grow back and its losses are those of another "
    "training; no dense run of this config is faster, which is why times are compared with it. "
    "masked dense: hooks multiply gradients by masks; pruned weights start at zero and stay there. "
    "compact: sparse_comm's, by the block `sparse_comm` in the config; in bold how it keeps "
    "weights if not told.",
    f"Steps of one side come in blocks of {BLOCK}, in an order of sides that changes from block to "
    f"block; the first {UNTIMED} of a block are not timed. All sides see the same batches. step: "
    "of the slower rank; medians with 95 % bootstrap intervals; ratios are of medians, resampled "
    "in pairs of equal batches.",
    "forward, backward, optimizer: medians, in ms, of the slower rank. backward holds the "
    "reduction of gradients; optimizer is the engine's `step()`, with its gathering of updated "
    "parameters; ZeRO 3 gathers parameters in forward and backward, too.",
    "gloo's reduce_scatter sends as much as an all-reduce: what ZeRO 2 and 3 send here is more "
    "than on a backend that has a real one, dense and compact alike.",
    f"last losses: mean of the last {FINAL_STEPS} steps (or of all, if fewer). held-out loss: by "
    "the engine in eval mode, in bf16. largest |Δloss|: over all steps, against masked dense; "
    f"above {compare_report.LIMIT:g} the script fails, as it does if a pruned weight of a masked "
    "or compact side is not exactly zero.",
)


def write(rows: Sequence[Row], plan: Plan, notes: list[str], origin: dict[str, str]) -> None:
    judged = compare_report.verdicts(rows, plan.judge_times)
    facts = {
        "settings": plan.size | {"density": DENSITY, "stages": list(plan.stages)},
        "notes": notes,
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    title = "One pruned GPT under DeepSpeed, dense and compact"
    parts = compare_report.markdown(rows, judged, plan.plot, [*notes, *NOTES])
    results.write(plan.out, plan.name, facts, title, parts, origin)
    compare_plot.draw(rows, plan.out / plan.plot)
    for verdict in judged:
        print(compare_report.sentence(verdict, mark=""))


if __name__ == "__main__":
    sys.exit(main())
