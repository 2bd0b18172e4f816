"""The comparison of ``compare_comm.py --framework deepspeed``, by ZeRO stage."""

from . import deepspeed_plot, deepspeed_report
from .bench import RANKS
from .compare_run import Framework
from .pair import BLOCK, UNTIMED
from .step_peers import LEARNING_RATE, WEIGHT_DECAY
from .step_report import FINAL_STEPS
from .step_start import CONTEXT, SIZE

FULL = {"layers": 9, "width": 512, "warm_up": 40, "steps": 40, "tokens": 64}
QUICK = {"layers": 2, "width": 256, "warm_up": 4, "steps": 5, "tokens": 16}


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
    f"above {deepspeed_report.LIMIT:g} the script fails, but for dense, as it does if a pruned "
    "weight of a masked or compact side is not exactly zero.",
)

DEEPSPEED = Framework(
    package="deepspeed",
    name="DeepSpeed",
    sections="stages",
    module="lib.deepspeed_rank",
    ranks=lambda stage: RANKS,
    sides=deepspeed_report.sides_of,
    settings=lambda stage: {"stage": stage},
    full=FULL,
    quick=QUICK,
    about=about,
    report=deepspeed_report,
    draw=deepspeed_plot.draw,
    notes=NOTES,
)
