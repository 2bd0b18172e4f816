"""Turns what the ranks of ``pipeline_rank.py`` measured into tables, and checks the targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from . import bench, results
from .bench import Estimate, link_name
from .pipeline_kinds import AUTO, CHANNELS, DENSE, EXACT, NOTHING, OURS, SAME_WAY, ZEROS
from .pipeline_models import PLAIN, WIDE_STEM
from .verdict import Verdict

SEND_TARGET = 3.5  # times as fast as dense in bf16, alone
STEP_TARGET = 2.0  # times as fast
AUTO_TARGET = 1.02  # times dense, where nothing can be left out
CHANNELS_TARGET = 1.01  # times the kept fraction
MARGIN = 0.005  # of dense, for headers
TIME_LINK = "1gbit"  # that the targets of times are for

Section = tuple[str, int, str]  # model, stages, dtype


@dataclass(frozen=True)
class Row:
    """One side of one model over one link."""

    link: str
    section: Section
    kind: str
    time: Estimate  # s, of a step of the slowest rank
    ratio: Estimate  # torch's own dense sends over this
    alone: Estimate  # s, of an activation and its gradient over the last boundary
    alone_ratio: Estimate
    forward: float  # bytes of the messages of a step, over all boundaries, activations
    back: float  # gradients
    dense: float  # bytes of either direction, dense
    sent: float | None  # bytes that a rank sent in a step, by its interface's counter
    exposed: float  # s: the step, less one without sends
    loss: float  # on data that was held out
    accuracy: float
    difference: float  # largest between two losses, against dense sends
    zeros: list[float]  # of the tensors at the cut
    kept: float  # fraction of the channels that go over the last boundary
    nonzero: float  # fraction of the bytes that go over it whose entries are not zero
    share: list[float]  # bytes of a message over it, of dense: activations, gradients
    losses: list[float] = field(repr=False)
    seconds: list[float] = field(repr=False)

    @property
    def place(self) -> tuple[str, Section]:
        return self.link, self.section

    @property
    def wrong(self) -> bool:
        """Whether it should be exact, and is not."""
        if self.kind not in EXACT:
            return False
        return self.difference != 0 or not all(math.isfinite(loss) for loss in self.losses)


def title_of(link: str, section: Section) -> str:
    model, stages, dtype = section
    return f"{model}, {stages} stages, {dtype}, {link_name(link)}"


def rows_of(link: str, section: Section, ranks: Sequence[dict], zeros: list[float]) -> list[Row]:
    """The rows of one model over one link, from what its ranks returned."""
    sides = list(zip(*(rank["sides"] for rank in ranks), strict=True))
    seconds = {own[0]["kind"]: _slowest(own, "seconds") for own in sides}
    alone = {own[0]["kind"]: _slowest(own[-2:], "alone") for own in sides}
    losses = {own[0]["kind"]: own[-1]["losses"] for own in sides}
    free = bench.median(seconds[NOTHING]).value
    dense = sum(own["traffic"]["forward"][0] for own in _of(sides, SAME_WAY))
    rows = []
    for own in sides:
        kind = own[0]["kind"]
        time = bench.median(seconds[kind])
        counted = [fmean(facts["bytes"]) for facts in own if facts["bytes"]]
        forward, back = (
            sum(facts["traffic"][way][1] for facts in own) for way in ("forward", "back")
        )
        rows.append(
            Row(
                link,
                section,
                kind,
                time,
                bench.ratio(seconds[DENSE], seconds[kind]),
                bench.median(alone[kind]),
                bench.ratio(alone[DENSE], alone[kind]),
                forward,
                back,
                dense,
                fmean(counted) / (len(ranks) if link == bench.LOOPBACK else 1) if counted else None,
                time.value - free,
                own[-1]["loss"],
                own[-1]["accuracy"],
                max(abs(a - b) for a, b in zip(losses[kind], losses[DENSE], strict=True)),
                zeros,
                own[-2]["kept"],
                own[-2]["nonzero"],
                [own[-2]["share"]["forward"], own[-1]["share"]["back"]],
                losses[kind],
                seconds[kind],
            )
        )
    return rows


def _of(sides: Sequence[Sequence[dict]], kind: str) -> Sequence[dict]:
    return next(own for own in sides if own[0]["kind"] == kind)


def _slowest(sides: Sequence[dict], what: str) -> list[float]:
    return [max(each) for each in zip(*(facts[what] for facts in sides), strict=True)]


def places(rows: Sequence[Row]) -> list[tuple[str, Section]]:
    return list(dict.fromkeys(row.place for row in rows))


# --- targets -------------------------------------------------------------------------------------


def verdicts(rows: Sequence[Row], judge_times: bool) -> list[Verdict]:
    """The targets of what was measured, those of times only if they are for these models."""
    judged = []
    for link, section in places(rows):
        found = {row.kind: row for row in rows if row.place == (link, section)}
        where = title_of(link, section)
        difference = max(found[kind].difference for kind in OURS)
        text = "largest difference between losses and those of torch's own sends"
        judged.append(Verdict(where, text, f"{difference:.1e}", "0", difference == 0))
        judged += _of_bytes(where, found)
        if judge_times and link == TIME_LINK:
            judged += _of_times(where, found, section)
    return judged


def _of_bytes(where: str, found: dict[str, Row]) -> list[Verdict]:
    zeros, channels, dense = found[ZEROS], found[CHANNELS], found[DENSE]
    judged = []
    if zeros.share[0] < 1:
        most = zeros.nonzero + 1 / (8 * (4 if zeros.section[2] == "fp32" else 2)) + MARGIN
        texts = [("activations, their bits included", zeros.share[0], most)]
        if zeros.share[1] < zeros.share[0]:  # else not all that is sent has a ReLU behind it
            texts.append(("gradients, by the same bits", zeros.share[1], zeros.nonzero + MARGIN))
        judged = [
            Verdict(
                where,
                f"{ZEROS}: bytes of {what}, over dense; {zeros.nonzero:.4f} are not zero",
                f"{share:.4f}",
                f"at most {limit:.4f}",
                share <= limit,
            )
            for what, share, limit in texts
        ]
    if channels.kept < 1 and channels.sent and dense.sent and channels.section[1] == 2:
        share, most = channels.sent / dense.sent, CHANNELS_TARGET * channels.kept
        text = f"{CHANNELS}: bytes sent over dense; {channels.kept:.4f} of the channels are kept"
        judged.append(Verdict(where, text, f"{share:.4f}", f"at most {most:.4f}", share <= most))
    return judged


def _of_times(where: str, found: dict[str, Row], section: Section) -> list[Verdict]:
    model, _, dtype = section
    judged = []
    if model == WIDE_STEM and dtype == "bf16":
        alone, ratio = found[ZEROS].alone_ratio.value, found[AUTO].ratio.value
        judged += [
            Verdict(
                where,
                f"time of a message and its answer, dense over {ZEROS}",
                f"{alone:.2f}",
                f"at least {SEND_TARGET:g}",
                alone >= SEND_TARGET,
            ),
            Verdict(
                where,
                f"step, dense over {AUTO}",
                f"{ratio:.2f}",
                f"at least {STEP_TARGET:g}",
                ratio >= STEP_TARGET,
            ),
        ]
    if model == PLAIN:
        cost = 1 / found[AUTO].ratio.value
        judged.append(
            Verdict(
                where,
                f"step with {AUTO} over dense, where nothing can be left out",
                f"{cost:.3f}",
                f"at most {AUTO_TARGET:g}",
                cost <= AUTO_TARGET,
            )
        )
    return judged


# --- as text -------------------------------------------------------------------------------------

HEAD = (
    "sends",
    "MB of activations",
    "MB of gradients",
    "MB sent",
    "alone, ms",
    "dense / this",
    "exposed, ms",
    "step, ms",
    "dense / this",
    "held-out loss",
    "accuracy",
    "largest \\|Δloss\\|",
)


def cells(row: Row) -> list[str]:
    training = row.kind != NOTHING
    return [
        f"**{row.kind}**" if row.kind in OURS else row.kind,
        f"{row.forward / 1e6:.2f}",
        f"{row.back / 1e6:.2f}",
        "–" if row.sent is None else f"{row.sent / 1e6:.2f}",
        row.alone.text(2, scale=1e-3),
        row.alone_ratio.text(2),
        f"{row.exposed * 1e3:.1f}",
        row.time.text(1, scale=1e-3),
        row.ratio.text(2),
        f"{row.loss:.4f}" if training else "–",
        f"{row.accuracy:.3f}" if training else "–",
        f"{row.difference:.1e}" if training else "–",
    ]


SHORT_KINDS = (*OURS, NOTHING)
IN_SHORT = (
    *("model", "zeros at the cut", f"a message and its answer, alone: {ZEROS}"),
    *(f"step: {kind}" for kind in SHORT_KINDS),
)


def summary(rows: Sequence[Row]) -> list[str]:
    """How many times as fast as torch's own dense sends, over each link."""
    parts = ["## In short", "Times as fast as torch's own dense sends."]
    for link in dict.fromkeys(row.link for row in rows):
        lines = []
        for section in dict.fromkeys(row.section for row in rows):
            found = {row.kind: row for row in rows if row.place == (link, section)}
            model, stages, dtype = section
            ratios = [found[ZEROS].alone_ratio, *(found[k].ratio for k in SHORT_KINDS)]
            cut = _zeros(found[DENSE])
            lines.append([f"{model}, {stages} stages, {dtype}", cut, *(r.text(2) for r in ratios)])
        parts.append(f"{link_name(link)}:")
        parts.append(results.markdown_table(IN_SHORT, lines))
    return parts


def _zeros(row: Row) -> str:
    return " and ".join(f"{fraction:.1%}" for fraction in row.zeros)


def tables(rows: Sequence[Row]) -> list[str]:
    """A heading and a table for each model over each link."""
    parts = []
    for link, section in places(rows):
        of_this = [row for row in rows if row.place == (link, section)]
        parts.append(f"## {title_of(link, section)}")
        parts.append(f"Zeros at the cut after the warm-up: {_zeros(of_this[0])}.")
        parts.append(results.markdown_table(HEAD, [cells(row) for row in of_this]))
    return parts
