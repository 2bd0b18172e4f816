"""The comparison of ``compare_comm.py --framework axonn``, on grids of stages and replicas."""

from . import axonn_plot, axonn_report
from .axonn_kinds import KINDS, RELEASED, RELEASED_BF16
from .compare_run import Framework
from .pair import BLOCK, UNTIMED
from .step_peers import LEARNING_RATE, WEIGHT_DECAY
from .step_report import FINAL_STEPS
from .step_start import CONTEXT, SIZE

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
    f"over all steps, against masked dense. Of compact sides above {axonn_report.LIMIT:g} the "
    "script fails, as it does if a pruned weight of a masked or compact side is not exactly zero; "
    "in the others pruned weights grow back, which is another training.",
)

AXONN = Framework(
    package="axonn",
    name="AxoNN",
    sections="grids",
    module="lib.axonn_rank",
    ranks=lambda grid: grid[0] * grid[1],
    sides=lambda grid: KINDS,
    settings=lambda grid: {"G_inter": grid[0], "G_data": grid[1]},
    full=FULL,
    quick=QUICK,
    about=about,
    report=axonn_report,
    draw=axonn_plot.draw,
    notes=NOTES,
)
