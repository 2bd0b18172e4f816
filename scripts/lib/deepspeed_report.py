"""Turns what the ranks of ``deepspeed_rank.py`` measured into tables, and checks the targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from . import bench, results
from .bench import LOOPBACK, Estimate, link_name
from .step_kinds import CACHED, COMPUTE_BF16, MASKED_DENSE, ROUNDING, TRANSIENT, Phases
from .step_report import FINAL_STEPS, means, slower_steps
from .verdict import Verdict

DENSE = "dense"
PHASES = ("forward", "backward", "optimizer")
COMPACT = (CACHED, TRANSIENT)
LIMIT = ROUNDING[COMPUTE_BF16]  # what losses may differ by, in nats

BYTES_TARGET = 1.03  # times f × dense, at most
TIME_LINK = "1gbit"  # that the targets of times are for
TIME_TARGETS = {1: 4.0, 2: 4.0, 3: 3.0}  # times as fast as dense, by ZeRO stage


def sides_of(stage: int) -> tuple[str, ...]:
    """What is compared in a ZeRO stage: cached dense weights would undo stage 3."""
    cached = () if stage == 3 else (CACHED,)
    return (DENSE, MASKED_DENSE, *cached, TRANSIENT)


def default_of(stage: int) -> str:
    """How sparse_comm keeps weights in a ZeRO stage, if not told."""
    return TRANSIENT if stage == 3 else CACHED


@dataclass(frozen=True)
class Row:
    """One side of one ZeRO stage over one link; losses are means over the ranks."""

    link: str
    stage: int
    kind: str
    density: float  # f: unpruned parameters over all
    sent: float | None  # bytes that a rank sent in a step, by its interface's counter
    share: float | None  # of what dense sent
    time: Estimate  # s, of a step
    ratio: Estimate  # dense over this
    phases: Phases  # s, medians
    last_loss: float
    held_out: float
    difference: float  # largest between two losses, against masked dense
    pruned_weights_left: int
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)

    @property
    def section(self) -> tuple[str, int]:
        return self.link, self.stage

    @property
    def is_default(self) -> bool:
        return self.kind == default_of(self.stage)

    @property
    def wrong(self) -> bool:
        """Whether it is not the training that it should be."""
        if not all(math.isfinite(loss) for loss in [*self.losses, self.held_out]):
            return True
        if self.kind == DENSE:  # its pruned weights grow back
            return False
        return not self.difference <= LIMIT or self.pruned_weights_left > 0


def title_of(link: str, stage: int) -> str:
    return f"{link_name(link)}, ZeRO {stage}"


def rows_of(link: str, stage: int, ranks: Sequence[dict]) -> list[Row]:
    """The rows of one stage over one link, from what its ranks returned."""
    sharing = len(ranks) if link == LOOPBACK else 1  # ranks that share a counter
    sides = list(zip(*(rank["peers"] for rank in ranks), strict=True))
    seconds = {both[0]["kind"]: slower_steps(both) for both in sides}
    losses = {both[0]["kind"]: means(facts["losses"] for facts in both) for both in sides}
    sent = {both[0]["kind"]: _sent(both, sharing) for both in sides}
    dense_sent = sent[DENSE]
    rows = []
    for both in sides:
        kind = both[0]["kind"]
        own_sent = sent[kind]
        rows.append(
            Row(
                link,
                stage,
                kind,
                ranks[0]["unpruned"] / ranks[0]["parameters"],
                own_sent,
                own_sent / dense_sent if own_sent and dense_sent else None,
                bench.median(seconds[kind]),
                bench.ratio(seconds[DENSE], seconds[kind]),
                _phases(both),
                fmean(losses[kind][-FINAL_STEPS:]),
                fmean(facts["held_out"] for facts in both),
                max(abs(a - b) for a, b in zip(losses[kind], losses[MASKED_DENSE], strict=True)),
                max(facts["pruned_weights_left"] for facts in both),
                losses[kind],
                seconds[kind],
            )
        )
    return rows


def _sent(ranks: Sequence[dict], sharing: int) -> float | None:
    """Bytes that a rank sent in a step; None where they could not be counted."""
    counted = means(facts["bytes"] for facts in ranks)
    return fmean(counted) / sharing if counted else None


def _phases(ranks: Sequence[dict]) -> Phases:
    """Medians over the steps, of the slower rank in each."""
    steps = zip(*(facts["phases"] for facts in ranks), strict=True)
    slower = [max(step, key=lambda phases: sum(phases.values())) for step in steps]
    return {name: median(phases[name] for phases in slower) for name in PHASES}


def links(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.link for row in rows))


def sections(rows: Sequence[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys(row.section for row in rows))


# --- targets -------------------------------------------------------------------------------------


def verdicts(rows: Sequence[Row], judge_times: bool) -> list[Verdict]:
    """The targets of what was measured, those of times only if they are for this model."""
    judged = []
    for link, stage in sections(rows):
        where = title_of(link, stage)
        compact = [row for row in rows if row.section == (link, stage) and row.kind in COMPACT]
        shares = [row.share for row in compact if row.share is not None]
        if shares:
            most = BYTES_TARGET * compact[0].density
            text = "compact training's bytes over dense training's"
            got, wanted = f"{max(shares):.4f}", f"at most {BYTES_TARGET} × f = {most:.4f}"
            judged.append(Verdict(where, text, got, wanted, max(shares) <= most))
        if judge_times and link == TIME_LINK and (least := TIME_TARGETS.get(stage)):
            [row] = [row for row in compact if row.is_default]
            text = f"a dense step's time over that of {row.kind}"
            got, wanted = row.ratio.text(2), f"at least {least:g}"
            judged.append(Verdict(where, text, got, wanted, row.ratio.value >= least))
        difference = max(row.difference for row in compact)
        text = "largest difference between compact training's losses and masked dense training's"
        judged.append(Verdict(where, text, f"{difference:.1e}", "0", difference == 0))
    return judged


# --- as text -------------------------------------------------------------------------------------

HEAD = (
    "ZeRO",
    "side",
    "MB sent a step",
    "of dense's",
    "step, ms",
    "dense / this",
    *PHASES,
    "last losses",
    "held-out loss",
    "largest \\|Δloss\\|",
)


def cells(row: Row) -> list[str]:
    return [
        str(row.stage),
        f"**{row.kind}**" if row.is_default else row.kind,
        "–" if row.sent is None else f"{row.sent / 1e6:.2f}",
        "–" if row.share is None else f"{row.share:.4f}",
        row.time.text(0, scale=1e-3),
        row.ratio.text(2),
        *(f"{row.phases[name] * 1e3:.1f}" for name in PHASES),
        f"{row.last_loss:.4f}",
        f"{row.held_out:.4f}",
        f"{row.difference:.1e}",
    ]


def tables(rows: Sequence[Row]) -> list[str]:
    """A heading and a table for each link."""
    parts = []
    for link in links(rows):
        parts.append(f"## {link_name(link)}")
        of_this = [cells(row) for row in rows if row.link == link]
        parts.append(results.markdown_table(HEAD, of_this, texts=2))
    return parts
