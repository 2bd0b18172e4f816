"""Turns what ``bench_kernels.py`` measured into rows and tables, and checks the targets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import bench, kernel_timing, results
from .bench import Estimate
from .kernel_calls import CallRow
from .kernel_cases import (
    ACCUMULATE,
    COPY_ONTO_ZEROS,
    EXPAND,
    INDEX_COPY,
    PACK,
    SELECT,
    SHORT,
    Case,
    ours,
)
from .kernel_floors import COPY, DATA_FILL, READ, ZERO_FILL
from .kernel_step import COMPACT, StepRow
from .kernel_threads import BUSY, FREE, ThreadsRow
from .kernel_timing import Samples

HEADLINE = 0.1  # the density whose table has all columns
# Columns, by the kind of floor. The floor is what the targets name, for all bytes that move. The
# others are for the dense tensor alone: nothing that reads or writes it is faster.
FLOOR, OF_READ, OF_DATA_FILL = "of the floor", "of the read alone", "of such data's fill alone"
COLUMNS = {COPY: FLOOR, ZERO_FILL: FLOOR, READ: OF_READ, DATA_FILL: OF_DATA_FILL}


@dataclass(frozen=True)
class KernelRow:
    """One way to do one operation; a fraction is the floor's time over this one's."""

    operation: str
    source: str
    target: str
    density: float
    how: str
    time: Estimate  # seconds
    fractions: dict[str, Estimate]
    against_torch: Estimate  # time of torch's best over this one's
    wrong: bool  # whether its result is not the reference's, bit for bit
    seconds: list[float] = field(repr=False)

    @property
    def pair(self) -> str:
        return f"{self.source} → {self.target}"


@dataclass(frozen=True)
class FloorRow:
    """What memory does."""

    how: str
    time: Estimate  # seconds
    rate: float  # bytes read and written a second, by the median


def rows_of(
    case: Case, measured: Mapping[Any, Samples], exact: Mapping[str, bool]
) -> list[KernelRow]:
    torch_ones = [measured[name] for name in case.sides if name not in ours()]
    best = min(torch_ones, key=lambda samples: kernel_timing.median(samples).value)
    return [
        KernelRow(
            case.operation,
            SHORT[case.source],
            SHORT[case.target],
            case.density,
            how,
            kernel_timing.median(measured[how]),
            _fractions(case, measured, how),
            kernel_timing.ratio(best, measured[how]),
            not exact[how],
            list(measured[how].values()),
        )
        for how in case.sides
    ]


def _fractions(case: Case, measured: Mapping[Any, Samples], how: str) -> dict[str, Estimate]:
    """By the fastest floor of each kind."""
    found = {}
    for kind, whole in case.floor_bytes.items():
        floors = [measured[name] for name in case.floors if name[0] == kind]
        fastest = min(floors, key=lambda samples: kernel_timing.median(samples).value)
        column = COLUMNS[kind]
        factor = case.moved_bytes / whole if column == FLOOR else 1.0
        found[column] = kernel_timing.ratio(fastest, measured[how], factor)
    return found


# --- targets -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """A target and whether it is reached: None where this run cannot tell, for the reason given."""

    text: str
    got: Estimate
    wanted: str
    reached: bool | None
    reason: str = ""


PACK_OF_FLOOR, EXPAND_OF_FLOOR = 0.80, 0.88
PACK_AGAINST_SELECT, EXPAND_AGAINST_COPY = 1.4, 2.0
SCALING, NO_HARM = 1.5, 0.95  # no harm is a speed-up of 1, less what the clock cannot tell apart
IDLE = 0.25  # of a core may be used by others where cores count as free
STEP = {0.1: 0.20, 0.2: 0.30, 0.5: 0.58}  # of the dense time, by density


def verdicts(
    kernels: Sequence[KernelRow], threads: Sequence[ThreadsRow], steps: Sequence[StepRow]
) -> list[Verdict]:
    found = {(r.operation, r.source, r.target, r.density, r.how): r for r in kernels}
    used = ours()[0]

    def row(operation: str, pair: tuple[str, str], how: str = used) -> KernelRow:
        source, target = pair
        return found[operation, source, target, HEADLINE, how]

    bf16 = ("bf16", "bf16")
    pack = row(PACK, bf16)
    select = min((row(PACK, bf16, how) for how in SELECT), key=lambda r: r.time.value)
    judged = _of_floors(pack, PACK_OF_FLOOR)
    judged.append(_faster(pack, select, PACK_AGAINST_SELECT))
    for pair in (("fp32", "bf16"), bf16):
        expand = row(EXPAND, pair)
        judged += _of_floors(expand, EXPAND_OF_FLOOR)
        for how in (INDEX_COPY, COPY_ONTO_ZEROS):
            judged.append(_faster(expand, row(EXPAND, pair, how), EXPAND_AGAINST_COPY))
    judged += of_threads(threads)
    judged += [
        _at_most(
            f"optimizer step, f = {r.density:g}, over the faster dense", r.of_best, STEP[r.density]
        )
        for r in steps
        if r.how == COMPACT
    ]
    return judged


def _of_floors(row: KernelRow, wanted: float) -> list[Verdict]:
    what = f"{row.operation} {row.pair}"
    return [
        _at_least(f"{what}, fraction {column}", fraction, wanted)
        if column == FLOOR
        else Verdict(f"{what}, fraction {column}", fraction, "–", None, "no target, a bound")
        for column, fraction in row.fractions.items()
    ]


def _faster(row: KernelRow, other: KernelRow, wanted: float) -> Verdict:
    got = bench.ratio(other.seconds, row.seconds)
    return _at_least(f"{row.operation} {row.pair}, times as fast as {other.how}", got, wanted)


def of_threads(rows: Sequence[ThreadsRow]) -> list[Verdict]:
    """Scaling is judged while no one else uses the cores; harm always."""
    judged = []
    largest = max(row.numel for row in rows)
    rows = [row for row in rows if row.operation in (PACK, EXPAND)]
    for row in rows:
        if row.numel == largest and row.other_core == FREE:
            text = f"{row.operation}, 2 threads, times as fast as 1"
            if row.others > IDLE:
                reason = f"cannot tell: others used {row.others:.1f} cores"
                judged.append(Verdict(text, row.speedup, f"≥ {SCALING:.2f}", None, reason))
            else:
                judged.append(_at_least(text, row.speedup, SCALING))
    for state in (FREE, BUSY):
        worst = min(
            (row for row in rows if row.other_core == state), key=lambda row: row.speedup.value
        )
        text = f"2 threads do no harm, other core {state}: worst case, {worst.operation} of "
        judged.append(_at_least(f"{text}{_millions(worst.numel)}", worst.speedup, NO_HARM))
    return judged


def _at_least(text: str, got: Estimate, wanted: float) -> Verdict:
    return Verdict(text, got, f"≥ {wanted:.2f}", got.value >= wanted)


def _at_most(text: str, got: Estimate, wanted: float) -> Verdict:
    return Verdict(text, got, f"≤ {wanted:.2f}", got.value <= wanted)


# --- as text -------------------------------------------------------------------------------------


def verdict_cells(verdict: Verdict) -> list[str]:
    if verdict.reached is None:
        word = verdict.reason
    else:
        word = "reached" if verdict.reached else "**missed**"
    return [verdict.text, verdict.got.text(2), verdict.wanted, word]


VERDICT_HEAD = ("target", "measured", "wanted", "")


def targets_table(judged: Sequence[Verdict]) -> str:
    return results.markdown_table(VERDICT_HEAD, [verdict_cells(verdict) for verdict in judged])


def floors_table(rows: Sequence[FloorRow]) -> str:
    head = ("memory", "ms", "GB/s read and written")
    cells = [(row.how, row.time.text(2, 1e-3), f"{row.rate / 1e9:.1f}") for row in rows]
    return results.markdown_table(head, cells)


def headline_table(rows: Sequence[KernelRow], operation: str) -> str:
    """All columns, at one density; sorted as they were measured."""
    chosen = [r for r in rows if r.operation == operation and r.density == HEADLINE]
    columns = list(chosen[0].fractions)
    head = ("dtypes", "how", "ms", *columns, "best of torch / this")
    cells = [
        (
            row.pair,
            _how(row),
            row.time.text(2, 1e-3),
            *(row.fractions[column].text(2) for column in columns),
            row.against_torch.text(2),
        )
        for row in chosen
    ]
    return results.markdown_table(head, cells, texts=2)


def density_table(rows: Sequence[KernelRow], operation: str) -> str:
    """Milliseconds and the fraction of the floor at each density."""
    chosen = [row for row in rows if row.operation == operation]
    densities = list(dict.fromkeys(row.density for row in chosen))
    by_way: dict[tuple[str, str], dict[float, KernelRow]] = {}
    for row in chosen:
        by_way.setdefault((row.pair, _how(row)), {})[row.density] = row
    cells = [
        (*way, *(f"{r.time.value * 1e3:.2f} ({r.fractions[FLOOR].value:.2f})" for r in at.values()))
        for way, at in by_way.items()
    ]
    return results.markdown_table(("dtypes", "how", *(f"f = {f:g}" for f in densities)), cells, 2)


def _how(row: KernelRow) -> str:
    return f"**{row.how}**" if row.how == ours()[0] else row.how


def threads_table(rows: Sequence[ThreadsRow]) -> str:
    head = ("operation", "entries", "other core", "cores others used")
    cells = [
        (
            row.operation,
            _millions(row.numel),
            row.other_core,
            f"{row.others:.2f}",
            row.one.text(3, 1e-3),
            row.two.text(3, 1e-3),
            row.speedup.text(2),
        )
        for row in rows
    ]
    return results.markdown_table((*head, "1 thread, ms", "2 threads, ms", "1 / 2"), cells, texts=3)


def steps_table(rows: Sequence[StepRow]) -> str:
    cells = [
        (
            f"**{row.how}**" if row.how == COMPACT else row.how,
            f"{row.density:g}" if row.how.startswith(COMPACT) else "any",
            row.time.text(1, 1e-3),
            row.of_dense.text(2),
            row.of_lean.text(2),
        )
        for row in rows
    ]
    return results.markdown_table(("step", "f", "ms", "over the first", "over the second"), cells)


def calls_table(rows: Sequence[CallRow]) -> str:
    numels = list(dict.fromkeys(row.numel for row in rows))
    by_way: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        by_way.setdefault((row.operation, row.how), []).append(row.time.text(1, 1e-6))
    head = ("operation", "how", *(f"µs, {numel} entries" for numel in numels))
    return results.markdown_table(head, [(*way, *at) for way, at in by_way.items()], texts=2)


def _millions(numel: int) -> str:
    return f"{numel / 1e6:.3g}M"


def kernel_parts(rows: Sequence[KernelRow]) -> list[str]:
    """The sections of pack, accumulate and expand."""
    parts = []
    titles = {
        PACK: "Pack: the unpruned entries of a dense tensor",
        ACCUMULATE: "Accumulate: pack, added to what stands there",
        EXPAND: "Expand: a dense tensor from its values, zeros included",
    }
    for operation, title in titles.items():
        parts.append(f"## {title}")
        parts.append(f"At f = {HEADLINE:g}:")
        parts.append(headline_table(rows, operation))
        parts.append("At all densities, ms (fraction of the floor):")
        parts.append(density_table(rows, operation))
    return parts
