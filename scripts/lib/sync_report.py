"""Turns what the ranks of ``bench_sync.py`` measured into tables, and checks the targets."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from . import bench, results
from .bench import LOOPBACK, Estimate, link_name

OURS = "sparse_comm bf16"
DENSE_BF16, DENSE_FP32 = "dense bf16", "dense fp32"
SAMO = ("SAMO, bf16 collective", "SAMO, fp32 collective")
LOSSY = ("PowerSGD",)  # starts of kinds whose averages are not meant to be exact
LIMITS = {"fp32": 1e-6, "bf16": 1e-2}  # of the relative error of the others
NEAR = 0.9  # of the byte limit counts as reaching it


@dataclass(frozen=True)
class Row:
    """One way to reduce, over one link; ratios are dense times over this row's."""

    link: str
    kind: str
    density: float | None  # None where the whole gradient is reduced
    collectives: int
    payload: int  # bytes that a rank has to send
    sent: float | None  # bytes that a rank did send, by its interface's counter
    time: Estimate  # s
    bf16_ratio: Estimate
    fp32_ratio: Estimate
    error: float
    seconds: list[float] = field(repr=False)

    @property
    def label(self) -> str:
        return self.kind if self.density is None else f"{self.kind}, f = {self.density:g}"

    @property
    def wrong(self) -> bool:
        """Whether the averages are further from the exact ones than rounding explains."""
        if self.kind.startswith(LOSSY):
            return False
        # SAMO's gradients are bf16 before they are fp32.
        exact = "fp32" in self.kind and self.kind not in SAMO
        return not self.error <= LIMITS["fp32" if exact else "bf16"]


def rows_of(link: str, ranks: Sequence[dict]) -> list[Row]:
    """The rows of one link, from what its ranks returned."""
    interface = "lo" if link == LOOPBACK else "veth"
    peers = list(zip(*(rank["peers"] for rank in ranks), strict=True))
    measured = [bench.over_ranks(both, interface) for both in peers]
    dense = {peer[0]["kind"]: turns["seconds"] for peer, turns in zip(peers, measured, strict=True)}
    return [
        Row(
            link,
            first["kind"],
            first["density"],
            first["collectives"],
            first["payload"],
            sum(turns["bytes"]) / len(turns["bytes"]) if turns["bytes"] else None,
            bench.median(turns["seconds"]),
            bench.ratio(dense[DENSE_BF16], turns["seconds"]),
            bench.ratio(dense[DENSE_FP32], turns["seconds"]),
            first["error"],
            turns["seconds"],
        )
        for (first, *_), turns in zip(peers, measured, strict=True)
    ]


@dataclass(frozen=True)
class Verdict:
    """A target and whether it is reached."""

    link: str
    text: str
    wanted: float
    got: Estimate
    reached: bool
    remark: str = ""


# link, density, against, how many times faster
TARGETS = (
    ("1gbit", 0.1, DENSE_BF16, 9.0),
    ("1gbit", 0.1, DENSE_FP32, 17.0),
    ("1gbit", 0.2, DENSE_BF16, 4.5),
    ("1gbit", 0.2, DENSE_FP32, 9.0),
    (LOOPBACK, 0.1, DENSE_BF16, 4.0),
)
SAMO_TARGET = 2.0  # or at the byte limit


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """The targets of what was measured."""
    found = {(row.link, row.kind, row.density): row for row in rows}
    judged = []
    for link, density, against, wanted in TARGETS:
        if ours := found.get((link, OURS, density)):
            got = ours.bf16_ratio if against == DENSE_BF16 else ours.fp32_ratio
            text = f"{ours.label} against {against}"
            judged.append(Verdict(link, text, wanted, got, got.value >= wanted))
    for row in rows:
        if row.kind in SAMO:
            judged.append(_against_samo(found[row.link, OURS, row.density], row))
    return judged


def _against_samo(ours: Row, samo: Row) -> Verdict:
    """Twice as fast, or as fast as the bytes allow at the speed that dense bf16 reaches."""
    got = bench.ratio(samo.seconds, ours.seconds)
    assert ours.density is not None
    of_limit = ours.bf16_ratio.value * ours.density
    return Verdict(
        ours.link,
        f"{ours.label} against {samo.kind}",
        SAMO_TARGET,
        got,
        got.value >= SAMO_TARGET or of_limit >= NEAR,
        f"or at the byte limit: {of_limit:.0%} of it",
    )


# --- as text -------------------------------------------------------------------------------------

HEAD = (
    "averaged by",
    "f",
    "collectives",
    "MB by the formula",
    "MB counted",
    "ms",
    "dense bf16 / this",
    "dense fp32 / this",
    "relative error",
)


def cells(row: Row) -> list[str]:
    return [
        f"**{row.kind}**" if row.kind == OURS else row.kind,
        "–" if row.density is None else f"{row.density:g}",
        str(row.collectives),
        f"{row.payload / 1e6:.2f}",
        "–" if row.sent is None else f"{row.sent / 1e6:.2f}",
        row.time.text(1, scale=1e-3),
        row.bf16_ratio.text(2),
        row.fp32_ratio.text(2),
        f"{row.error:.1e}",
    ]


def verdict_cells(verdict: Verdict) -> list[str]:
    reached = "reached" if verdict.reached else "**missed**"
    wanted = f"≥ {verdict.wanted:g}×"
    if verdict.remark:
        wanted += f", {verdict.remark}"
    return [link_name(verdict.link), verdict.text, verdict.got.text(2), wanted, reached]


def markdown(rows: Sequence[Row], plot: str, notes: Sequence[str]) -> list[str]:
    """The parts of the report."""
    judged = [verdict_cells(verdict) for verdict in verdicts(rows)]
    target_head = ("link", "target", "measured", "wanted", "")
    parts = [
        f"![times of all]({plot})",
        "## Targets",
        results.markdown_table(target_head, judged, texts=2),
    ]
    for link in dict.fromkeys(row.link for row in rows):
        parts.append(f"## {heading(link)}")
        parts.append(results.markdown_table(HEAD, [cells(r) for r in rows if r.link == link]))
    return [*parts, "## How to read it", "\n".join(f"- {note}" for note in notes)]


def heading(link: str) -> str:
    bound = " (CPU-bound: two ranks cannot fill it)" if link == "10gbit" else ""
    return f"{link_name(link)}{bound}"
