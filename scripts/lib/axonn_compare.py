"""The comparison of ``compare_comm.py --framework axonn``, on grids of stages and replicas."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from . import axonn_plot, axonn_report, results
from .axonn_kinds import KINDS, RELEASED, RELEASED_BF16
from .axonn_report import Grid, Row
from .bench import LOOPBACK, run_over
from .compare_report import sentence
from .compare_run import possible, warm_up
from .job import add_bar, progress_bars, run_script
from .netns import LinkUnavailable
from .pair import BLOCK, UNTIMED
from .step_peers import LEARNING_RATE, WEIGHT_DECAY
from .step_report import FINAL_STEPS
from .step_start import CONTEXT, SIZE

DENSITY = 0.1  # unpruned parameters over all, those without a mask included
FULL = {
    "layers": 9,
    "width": 512,
    "warm_up": 40,
    "steps": 16,
    "tokens": 64,
    "batch": 4,
    "micro_batch": 1,
}
QUICK = FULL | {"layers": 2, "width": 256, "warm_up": 4, "steps": 5, "tokens": 16}


@dataclass(frozen=True)
class Plan:
    """What to compare, and where to write it."""

    grids: Sequence[Grid]
    links: Sequence[str]
    size: dict[str, int]  # of model and training, as FULL, and the seed
    out: Path
    name: str  # of the files
    judge_times: bool  # whether the targets of times are for this size

    @property
    def plot(self) -> str:
        return f"{self.name}.png"


def compare(plan: Plan) -> int:
    """Measure, and write the report; returns the exit status."""
    notes: list[str] = []
    try:
        return run_script(
            "The comparison",
            plan.out,
            f"{plan.name}.md, {plan.name}.json and {plan.plot}",
            measure=lambda console: run_all(plan, notes, console),
            write=lambda rows, origin: write(rows, plan, notes, origin),
            is_wrong=lambda row: row.wrong,
            complaint="Not the same training",
            packages=("axonn",),
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
            for grid in plan.grids:
                own = job | {"G_inter": grid[0], "G_data": grid[1]}
                title = axonn_report.title_of(link, grid)
                on_progress = add_bar(progress, title, len(KINDS) * plan.size["steps"])
                ranks, counted = run_over(
                    link, "lib.axonn_rank", own, on_progress, grid[0] * grid[1]
                )
                if not rows:
                    notes.insert(0, about(job, ranks[0]))
                rows += axonn_report.rows_of(link, grid, ranks)
                notes.append(f"MB sent, {title}: {counted}; a step's, mean over blocks.")
    return rows


def about(job: dict, rank: dict) -> str:
    count = job["batch"] // job["micro_batch"]
    return (
        "Ranks have one thread each, gloo, all on this machine: the slow link is emulated, between "
        "the first half of the ranks and the second. On the grid 2 × 2 four of them share two "
        "cores, the stages of a replica are on one side of the link, and the replicas on two. A "
        f"GPT of {job['layers']} blocks of width {job['width']}, {rank['parameters'] / 1e6:.2f}M "
        f"parameters, reads bytes of Python's standard library, {job['batch']} × {job['tokens']} a "
        f"replica and step, in {count} micro-batches. It was trained for {job['warm_up']} dense "
        f"steps on one process ({SIZE} × {CONTEXT} bytes each), then pruned by magnitude to "
        f"f = {rank['unpruned'] / rank['parameters']:.4f}, which counts embeddings, biases and "
        "norms, too; they have no mask."
    )


NOTES = (
    f"All sides compute in bf16 under autocast, with fp32 parameters, and step with torch's fused "
    f"AdamW (learning rate {LEARNING_RATE:g}, weight decay {WEIGHT_DECAY:g}).",
    f"{RELEASED}: AxoNN 0.2.0's reduction, one all-reduce a parameter after backward, in the "
    f"gradients' dtype, fp32. {RELEASED_BF16}: the same, each rounded to bf16, which AxoNN does "
    "not offer. The others are sparse_comm's, with gradients in bf16: dense, masked dense (hooks "
    "multiply gradients by masks) and compact; in buckets, which are reduced while the last "
    "micro-batch goes backward, or after it (no overlap). In bold what users get if not told "
    "otherwise.",
    "compute: forward, loss and backward, with packing and expanding of values. point-to-point: "
    "sending, and waiting for a message that is under way. bubble: waiting for one that the "
    "neighbour has not sent yet. collective: rounding and copying gradients into buckets and "
    "back, and waiting for what overlap has not hidden. Means over the ranks of medians over the "
    "timed steps, in ms, from the spans `sparse_comm::axonn.…` and `sparse_comm::reduce.…`, which "
    "a profile by torch.profiler shows, too. collectives under way: while at least one is, hidden "
    "or not; where they overlap with computing they share the cores with it.",
    f"Steps of one side come in blocks of {BLOCK}, in an order of sides that changes from block to "
    f"block; the first {UNTIMED} of a block are not timed. All sides see the same batches. step: "
    "of the slowest rank; medians with 95 % bootstrap intervals; ratios are of medians, resampled "
    "in pairs of equal batches.",
    f"last losses: mean of the last {FINAL_STEPS} steps (or of all, if fewer). largest |Δloss|: "
    f"over all steps, against masked dense; above {axonn_report.LIMIT:g} the script fails, as it "
    "does if a pruned weight of a masked or compact side is not exactly zero.",
)


def write(rows: Sequence[Row], plan: Plan, notes: list[str], origin: dict[str, str]) -> None:
    judged = axonn_report.verdicts(rows, plan.judge_times)
    facts = {
        "settings": plan.size | {"density": DENSITY, "grids": [list(g) for g in plan.grids]},
        "notes": notes,
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    title = "One pruned GPT under AxoNN, dense and compact"
    parts = axonn_report.markdown(rows, judged, plan.plot, [*notes, *NOTES])
    results.write(plan.out, plan.name, facts, title, parts, origin)
    axonn_plot.draw(rows, plan.out / plan.plot)
    for verdict in judged:
        print(sentence(verdict, mark=""))
