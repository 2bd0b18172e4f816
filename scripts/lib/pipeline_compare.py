"""The comparison of ``compare_comm.py --pipeline``: models, stages and links, by how they send."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from . import pipeline_plot, pipeline_report, results
from .bench import run_over
from .compare_run import possible_links
from .images import find_images
from .job import add_bar, progress_bars, run_job, run_script
from .pair import BLOCK, UNTIMED
from .pipeline_kinds import BF16, KINDS, NOTHING, SAME_WAY
from .pipeline_models import ALL, IMAGES, PLAIN, SQUARED, VGG, WIDE_RESNET, WIDE_STEM
from .pipeline_report import Section
from .pipeline_start import CHANNELS, LEARNING_RATE, SPARSITY

SECTIONS: tuple[Section, ...] = (
    (WIDE_STEM, 2, "bf16"),
    (WIDE_STEM, 2, "fp32"),
    (VGG, 2, "bf16"),
    (VGG, 3, "bf16"),
    (WIDE_RESNET, 2, "bf16"),
    (WIDE_RESNET, 3, "bf16"),
    (SQUARED, 2, "bf16"),
    (PLAIN, 2, "bf16"),
    (PLAIN, 3, "bf16"),
)
QUICK_SECTIONS: tuple[Section, ...] = ((WIDE_STEM, 2, "bf16"), (PLAIN, 2, "bf16"))
FULL = {"warm_up": 240, "steps": 32, "micro_batches": 8, "evaluations": 8}
QUICK = {"warm_up": 8, "steps": 6, "micro_batches": 4, "evaluations": 1}
REPEATS = {PLAIN: 3}  # times as many steps: its target is 2 %
NAME = "pipeline"


@dataclass(frozen=True)
class Plan:
    """What to compare, and where to write it."""

    sections: Sequence[Section]
    links: Sequence[str]
    size: dict[str, int]  # as FULL, and the seed
    out: Path
    judge_times: bool  # whether the targets of times are for this size


def compare(plan: Plan) -> int:
    """Measure, and write the report; returns the exit status."""
    notes: list[str] = []
    return run_script(
        "The comparison",
        plan.out,
        f"{NAME}.md, {NAME}.json and {NAME}.png",
        measure=lambda console: _run_all(plan, notes, console),
        write=lambda rows, origin: _write(plan, rows, notes, origin),
        is_wrong=lambda row: row.wrong,
        complaint="Not the same training",
        packages=("lz4",),
    )


def _run_all(plan: Plan, notes: list[str], console: Console) -> list:
    links = possible_links(plan.links, notes, console)
    images = str(find_images()) if any(model in IMAGES for model, *_ in plan.sections) else None
    rows: list = []
    with (
        tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder,
        progress_bars(console) as progress,
    ):
        starts: dict[str, dict] = {}
        for section in plan.sections:
            model, stages, dtype = section
            job: dict = plan.size | {
                "model": model,
                "stages": stages,
                "dtype": dtype,
                "images": images,
                "steps": plan.size["steps"] * REPEATS.get(model, 1),
            }
            job["kinds"] = [kind for kind in KINDS if dtype == "fp32" or kind != BF16]
            if model not in starts:
                starts[model] = _warm_up(job, Path(folder) / f"{len(starts)}.pt", progress)
            job |= {"start": starts[model]["file"]}
            for link in links:
                title = pipeline_report.title_of(link, section)
                bar = add_bar(progress, title, len(job["kinds"]) * job["steps"])
                ranks, _ = run_over(link, "lib.pipeline_rank", job, bar, stages)
                zeros = starts[model]["zeros"]
                rows += pipeline_report.rows_of(link, section, ranks, zeros)
    return rows


def _warm_up(job: dict, file: Path, progress: Progress) -> dict:
    """Train and prune a model on one process; where it is, and the zeros at its cut."""
    bar = add_bar(progress, f"warm-up, {job['model']}", job["warm_up"])
    (facts,) = run_job("lib.pipeline_start", job | {"start": str(file)}, 1, bar)
    return facts | {"file": str(file)}


def _write(plan: Plan, rows: Sequence, notes: list[str], origin: dict[str, str]) -> None:
    judged = pipeline_report.verdicts(rows, plan.judge_times)
    facts = {
        "settings": plan.size,
        "notes": notes,
        "targets": [asdict(verdict) for verdict in judged],
        "rows": [asdict(row) for row in rows],
    }
    parts = [
        f"![times of steps]({NAME}.png)",
        *pipeline_report.summary(rows),
        *pipeline_report.tables(rows),
        "## Targets",
        "\n".join(f"- {verdict.sentence()}" for verdict in judged),
        "## How to read it",
        "\n".join(f"- {note}" for note in [*notes, *_about(plan)]),
    ]
    title = "Sends between pipeline stages: dense, and what the next stage reads"
    results.write(plan.out, NAME, facts, title, parts, origin)
    pipeline_plot.draw(rows, plan.out / f"{NAME}.png")
    for verdict in judged:
        print(verdict.sentence(mark=""))


def _about(plan: Plan) -> list[str]:
    models = dict.fromkeys(model for model, *_ in plan.sections)
    cuts = "; ".join(f"{name}: {ALL[name].what}" for name in models)
    count = plan.size["micro_batches"]
    return [
        f"torch.distributed.pipelining, Schedule1F1B, {count} micro-batches a step (of "
        f"{ALL[VGG].batch} images, or {ALL[PLAIN].batch} × 64 bytes of text), a rank a stage with "
        "one thread, gloo, two cores; with three stages three ranks share them, and the link lies "
        "between the second and the third. The slow link is emulated between network namespaces.",
        f"Images are Fashion-MNIST's, text is Python's standard library. {cuts}.",
        f"Each model was trained for {plan.size['warm_up']} steps on one process; after half of "
        f"them {CHANNELS:.0%} of its channels were pruned (prune.channels), and of the rest the "
        f"smallest entries until {1 - SPARSITY:.0%} were left. Stages are compact, with AdamW "
        f"(learning rate {LEARNING_RATE:g}).",
        "dense: torch's own sends, in the dtype of the tensors. "
        f"{SAME_WAY}: the same bytes, received one ahead and not waited for, as all rows below it "
        f"are. {NOTHING}: messages without values, which train nothing: what a step takes if "
        "sends cost nothing. In bold what pipeline_codec offers.",
        "MB of activations and of gradients: of a step's messages over all boundaries; '0.00' "
        "where the framework sends them itself. MB sent: by the counter of a rank's interface, "
        "mean over ranks. alone: an activation of one micro-batch to the next stage and its "
        "gradient back, with encoding and decoding, nothing else going on. exposed: the step, less "
        "one without sends.",
        f"Steps of one side come in blocks of {BLOCK}, in an order that changes from block to "
        f"block; the first {UNTIMED} of a block are not timed. Medians with 95 % bootstrap "
        "intervals; ratios are of medians, resampled in pairs of equal batches.",
        "held-out loss and accuracy (of classes, or of bytes) after the last step. largest "
        "|Δloss|: over all steps, against torch's own sends; where it is to be 0 and is not, the "
        "script fails.",
    ]
