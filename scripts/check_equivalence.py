"""Checks that compact training equals masked dense training, bit for bit where it should.

Trains a small pruned GPT twice, from one start and on the same data: compact, and dense with its
weights multiplied by fp32 masks after each step (under DeepSpeed: its gradients, before). Does so
in one process, under DDP, FSDP2 and DeepSpeed's ZeRO stages (real processes, gloo), in both storage
modes, with single-tensor, foreach and fused optimizers, in fp32 and in several kinds of bf16. Ends
with status 1 if anything is not as expected.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console

from lib import results
from lib.equivalence_rank import BATCH, CONTEXT, LAYERS, LR, WIDTH, Case, Job, Layout, Mode
from lib.job import add_bar, progress_bars, run_job, run_script

FP32_LOSS_LIMIT = 1e-5  # where roundings may differ: fused kernels, another order of additions
BF16_LOSS_LIMIT = 5e-3
FUSED_ULPS = 1  # in one step, of weights that it moves by less than a quarter of their size
FUSED_ULPS_ANY = 8  # of the others: the update's last bit is worth several of theirs

MODES: tuple[Mode, ...] = ("cached", "transient")
IMPLEMENTATIONS = ("AdamW single", "AdamW foreach", "AdamW fused")
FP32 = tuple(Case(mode, optimizer) for mode, optimizer in product(MODES, IMPLEMENTATIONS))


def bf16(optimizers: tuple[str, ...], precisions: tuple[str, ...]) -> tuple[Case, ...]:
    return tuple(Case(mode, o, p) for o, p, mode in product(optimizers, precisions, MODES))


LAYOUTS: dict[str, tuple[Layout, tuple[Case, ...]]] = {
    "one process": (
        Layout("none", 1),
        FP32
        + bf16(
            ("AdamW foreach",),
            ("autocast", "autocast, bf16 weights, dense embedding", "autocast, bf16 weights"),
        )
        + bf16(("AdamW foreach", "SGD foreach"), ("bf16 values",)),
    ),
    "DDP, 2 ranks": (
        Layout("ddp", 2),
        FP32 + bf16(("AdamW foreach",), ("autocast", "bf16 values")),
    ),
    "FSDP2, 2 ranks": (
        Layout("fsdp2", 2),
        FP32 + bf16(("AdamW foreach",), ("policy bf16", "policy bf16, reduce fp32", "bf16 values")),
    ),
    "DDP, 3 ranks": (Layout("ddp", 3), FP32),
    "FSDP2, 3 ranks": (Layout("fsdp2", 3), FP32),
    "DDP, 3 ranks, rank order": (Layout("ddp", 3, in_rank_order=True), FP32),
    "FSDP2, 3 ranks, rank order": (Layout("fsdp2", 3, in_rank_order=True), FP32),
    **{
        f"DeepSpeed ZeRO {stage}, 2 ranks": (
            Layout(f"zero{stage}", 2),
            tuple(Case(mode, optimizer) for mode, optimizer in product(MODES, IMPLEMENTATIONS[:2])),
        )
        for stage in range(4)
    },
}


@dataclass(frozen=True)
class Row:
    """One pair of trainings, all ranks together."""

    layout: str
    weights: str
    optimizer: str
    precision: str
    expected: str
    as_expected: bool
    losses_identical: bool
    max_loss_difference: float
    first_loss: float  # dense, mean over ranks
    last_loss: float
    unpruned_weights: int
    weights_that_differ: int
    max_weight_difference: float
    max_ulps: float  # of weights above the learning rate
    pruned_weights_not_zero: int
    one_step: dict | None  # of fused optimizers


def main() -> int:
    options = parse_arguments()
    return run_script(
        "The check",
        options.out,
        "equivalence.md and equivalence.json",
        measure=lambda console: run_all(options, console),
        write=lambda rows, origin: write(rows, options, origin),
        is_wrong=lambda row: not row.as_expected,
        complaint="Not as expected",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Writes equivalence.md and equivalence.json. Takes some ten minutes on two cores.",
    )
    parser.add_argument(
        "--steps", type=int, default=50, help="steps of each training (default: %(default)s)"
    )
    parser.add_argument(
        "--density",
        type=float,
        default=0.1,
        help="fraction of each masked weight that is unpruned (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, masks and data (default: %(default)s)"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        choices=tuple(LAYOUTS),
        default=list(LAYOUTS),
        metavar="LAYOUT",
        help="which of the layouts, such as 'DDP, 2 ranks' (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=results.FOLDER / "equivalence",
        help="folder for the results (default: results/equivalence of the checkout)",
    )
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1")
    if not 0 < options.density <= 1:
        parser.error(f"--density is {options.density}; it must lie between 0 and 1, such as 0.1")
    return options


def run_all(options: argparse.Namespace, console: Console) -> list[Row]:
    rows = []
    chosen = {name: LAYOUTS[name] for name in options.layouts}
    with progress_bars(console) as progress:
        for name, (layout, cases) in chosen.items():
            job = asdict(Job(layout, cases, options.steps, options.density, options.seed))
            on_progress = add_bar(progress, name, total=len(cases))
            ranks = run_job("lib.equivalence_rank", job, layout.ranks, on_progress)
            for index, case in enumerate(cases):
                rows.append(row_of(name, layout, case, [rank["cases"][index] for rank in ranks]))
    return rows


def row_of(name: str, layout: Layout, case: Case, ranks: list[dict]) -> Row:
    """The ranks' losses together; the weights, of which each rank saw all, from the first."""
    apart = [
        abs(dense - compact)
        for rank in ranks
        for dense, compact in zip(*rank["losses"], strict=True)
    ]
    dense_losses = [rank["losses"][0] for rank in ranks]
    first = ranks[0]
    facts = {
        "losses_identical": not any(apart),
        "max_loss_difference": max(apart),
        "weights_that_differ": first["weights that differ"],
        "pruned_weights_not_zero": first["pruned weights not zero"],
        "one_step": first.get("one step"),
    }
    expected, holds = judge(layout, case, facts)
    return Row(
        name,
        case.weights,
        case.optimizer,
        case.precision,
        expected,
        holds and not facts["pruned_weights_not_zero"],
        first_loss=sum(losses[0] for losses in dense_losses) / len(ranks),
        last_loss=sum(losses[-1] for losses in dense_losses) / len(ranks),
        unpruned_weights=first["unpruned weights"],
        max_weight_difference=first["max weight difference"],
        max_ulps=first["max ulps of weights above the learning rate"],
        **facts,
    )


def judge(layout: Layout, case: Case, facts: dict) -> tuple[str, bool]:
    """What is expected of the case, and whether it holds."""
    identical = facts["losses_identical"] and not facts["weights_that_differ"]
    drift = facts["max_loss_difference"]
    if case.precision != "fp32":
        return f"losses within {BF16_LOSS_LIMIT:g}", drift <= BF16_LOSS_LIMIT
    same_additions = layout.ranks < 3 or layout.in_rank_order
    if not same_additions:
        return f"losses within {FP32_LOSS_LIMIT:g}", drift <= FP32_LOSS_LIMIT
    if not case.optimizer.endswith("fused"):
        return "bit-identical", identical
    step = facts["one_step"]
    holds = (
        not step["losses differ"]
        and not step["gradients differ"]
        and step["max ulps of weights that moved by less than a quarter"] <= FUSED_ULPS
        and step["max ulps"] <= FUSED_ULPS_ANY
        and drift <= FP32_LOSS_LIMIT
    )
    return f"{FUSED_ULPS} ulp a step; losses within {FP32_LOSS_LIMIT:g}", holds


def write(rows: list[Row], options: argparse.Namespace, origin: dict[str, str]) -> None:
    head = ["layout", "weights", "optimizer", "precision", "expected", "as expected", "losses"]
    head += ["largest \\|Δloss\\|", "weights", "largest \\|Δw\\|", "in ulps", "pruned weights ≠ 0"]
    table = results.markdown_table(head, [_cells(row) for row in rows], texts=6)
    step_head = ["layout", "weights", "gradients that differ", "weights that differ"]
    step_head += ["beyond 1 ulp", "most ulps", "of weights moved by < ¼"]
    fused = [row for row in rows if row.one_step]
    steps = results.markdown_table(step_head, [_step_cells(row) for row in fused], texts=2)
    settings = {key: vars(options)[key] for key in ("steps", "density", "seed")}
    results.write(
        options.out,
        "equivalence",
        {"settings": settings, "rows": [asdict(row) for row in rows]},
        "Compact training against masked dense training",
        [table, "## One fused step from equal states", steps, "## How to read it", _notes(rows)],
        origin,
    )


def _cells(row: Row) -> tuple[str, ...]:
    differ = row.weights_that_differ
    return (
        row.layout,
        row.weights,
        row.optimizer,
        row.precision,
        row.expected,
        "yes" if row.as_expected else "**no**",
        "identical" if row.losses_identical else "differ",
        f"{row.max_loss_difference:.1e}" if row.max_loss_difference else "0",
        f"{differ / row.unpruned_weights:.1%} differ" if differ else "identical",
        f"{row.max_weight_difference:.1e}" if differ else "0",
        f"{row.max_ulps:.0f}",
        str(row.pruned_weights_not_zero),
    )


def _step_cells(row: Row) -> tuple[str, ...]:
    step = row.one_step or {}
    counts = [step[key] for key in ("gradients differ", "weights differ", "beyond 1 ulp")]
    ulps = [step["max ulps"], step["max ulps of weights that moved by less than a quarter"]]
    return (row.layout, row.weights, *map(str, counts), *(f"{value:.0f}" for value in ulps))


def _notes(rows: list[Row]) -> str:
    weights = rows[0].unpruned_weights
    notes = [
        f"A GPT of {LAYERS} blocks, width {WIDTH}, {BATCH} sequences of {CONTEXT} tokens per rank "
        f"and step, learning rate {LR:g}, weight decay 0.1; {weights} unpruned weights. "
        "All matrices but the position embedding have random masks; biases and norms have none. "
        f"The dense loss falls from {rows[0].first_loss:.2f} to {rows[0].last_loss:.2f}.",
        "*Losses*: those of every step and rank. *Weights*: all unpruned ones, after the last "
        "step. *In ulps*: representable numbers between the two, the most for weights of one sign "
        "that are above the learning rate on both sides (smaller ones have ulps far below the "
        "rounding of an update).",
        "*Precision*: *autocast* has fp32 values under `torch.autocast`; *bf16 weights* is the "
        "same with `compute_dtype=torch.bfloat16`, which hands out the embedding's weight in bf16, "
        "too, where autocast leaves embeddings in fp32: the only difference, as the rows with a "
        "*dense embedding* show. *Policy* is FSDP2's `MixedPrecisionPolicy(param_dtype=bf16)`.",
        "*Rank order*: gloo adds the gradients of three or more ranks in an order that depends on "
        "the place in the bucket, and a compact gradient has other places. The rows in rank order "
        "add by a communication hook that does not, and nothing else is changed.",
        "*One fused step*: before each step the compact side gets the dense side's weights and "
        "optimizer state; then each makes a whole step of its own. Ulps are those of the weight "
        "before or after the step, whichever is larger. torch's fused kernels treat the last few "
        "entries of a tensor (its length modulo the vector's) with scalar code, whose update may "
        "differ in the last bits; dense and compact tensors have different last entries. Where "
        "a step moves a weight by less than a quarter of its size, that is at most one ulp of the "
        "weight; where the update is as large as the weight, it can be more.",
        "*Drift*: what those ulps, or another order of additions, grow to over all steps is what "
        "the first table shows.",
    ]
    return "\n".join(f"- {note}" for note in notes)


if __name__ == "__main__":
    sys.exit(main())
