"""``compare_comm.py --framework axonn`` trains alike in every masked side, and judges phases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from scripts.lib.axonn_kinds import (
    BUBBLE,
    BUCKETS,
    COLLECTIVE,
    COMPACT,
    COMPACT_AFTER,
    COMPUTE,
    KINDS,
    MASKED,
    OPTIMIZER,
    PHASES,
    POINT_TO_POINT,
    RELEASED,
    RELEASED_BF16,
)
from scripts.lib.axonn_phases import Span, phases, sends
from scripts.lib.axonn_report import grid, rows_of, verdicts
from scripts.lib.step_kinds import CACHED

pytest.importorskip("axonn")
pytestmark = pytest.mark.alone

SCRIPTS = Path(__file__).parent.parent / "scripts"


def start(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compare")
    options = ("--framework", "axonn", "--quick", "--links", "loopback", "--grids", "2x2")
    done = start("compare_comm.py", *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_side_stands_in_the_table_with_its_phases(written):
    out, printed = written
    facts = json.loads((out / "compare.json").read_text())
    assert [row["kind"] for row in facts["rows"]] == list(KINDS)
    text = (out / "compare.md").read_text()
    assert all(f"| {kind} |" in text or f"| **{kind}** |" in text for kind in KINDS)
    assert (out / "compare.png").stat().st_size > 10_000
    assert f"{len(KINDS)} of {len(KINDS)} rows are as they should be" in printed
    for row in facts["rows"]:
        assert set(row["phases"]) == set(PHASES)
        # they are parts of a step, which the slowest of four ranks takes longer for
        assert 0 < sum(row["phases"].values()) < 2 * row["time"]["value"]
        for phase in (COMPUTE, POINT_TO_POINT, BUBBLE, COLLECTIVE, OPTIMIZER):
            assert row["phases"][phase] > 0


def test_compact_losses_are_those_of_masked_dense_training_and_bytes_are_the_density_s(written):
    facts = json.loads((written[0] / "compare.json").read_text())
    rows = {row["kind"]: row for row in facts["rows"]}
    for kind in COMPACT:
        assert rows[kind]["losses"] == rows[MASKED]["losses"]
        assert rows[kind]["pruned_weights_left"] == 0
        assert rows[kind]["payload"] / rows[BUCKETS]["payload"] <= 1.02 * rows[kind]["density"]
    assert rows[RELEASED]["payload"] == 2 * rows[RELEASED_BF16]["payload"]
    assert rows[BUCKETS]["losses"] != rows[MASKED]["losses"]


def test_messages_of_a_quick_benchmark_are_all_there(tmp_path):
    done = start("bench_transport.py", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "transport.md").read_text()
    assert all(f"| {size} KiB |" in text for size in (64, 256, 1024, 4096, 16384))
    assert "What the engine adds to a message" in text


def test_options_that_cannot_work_are_refused():
    done = start("compare_comm.py", "--framework", "axonn", "--grids", "3x1")
    assert done.returncode == 2 and "'3x1' has an odd number of ranks" in done.stderr
    assert grid("2x1") == (2, 1)
    for text in ("2", "0x2", "x", "2x2x2"):
        with pytest.raises(ArgumentTypeError, match="is no grid: give stages x replicas"):
            grid(text)


# --- phases and reports, of spans made up --------------------------------------------------------

STEP = [
    Span("axonn.forward", 0.0, 2.0),
    Span("axonn.send", 1.5, 2.0),
    Span("axonn.wait", 2.0, 4.0),
    Span("axonn.backward", 4.0, 8.0),
    Span("reduce.compress", 6.0, 7.0),
    Span("reduce.all_reduce", 7.0, 7.5),
    Span("axonn.send", 8.0, 8.1),  # the last messages leave
    Span("axonn.collective", 8.1, 9.0),
    Span("reduce.wait", 8.1, 8.9),
    Span("optimizer", 9.0, 9.5),
]


def test_phases_are_told_apart_by_spans_and_by_when_a_neighbour_sent():
    found = phases(STEP, {"axonn.backward": [Span("axonn.send", 3.5, 3.6)]})
    assert found == pytest.approx(
        {
            COMPUTE: 1.5 + 2.5,
            POINT_TO_POINT: 0.5 + 0.1 + 0.5,
            BUBBLE: 1.5,
            COLLECTIVE: 1.5 + 0.9,
            OPTIMIZER: 0.5,
        }
    )
    early = phases(STEP, {"axonn.backward": [Span("axonn.send", 1.0, 1.1)]})
    assert early[BUBBLE] == 0 and early[POINT_TO_POINT] == pytest.approx(2.6)
    assert [send.start for send in sends(STEP, "axonn.forward")] == [1.5]


def side(kind: str, seconds: float, payload: float, wait: float, compute: float = 4.0) -> dict:
    spans = [
        ("axonn.forward", 0.0, compute),
        ("axonn.collective", compute, compute + wait),
        ("optimizer", compute + wait, compute + wait + 0.5),
    ]
    return {
        "kind": kind,
        "losses": [2.0, 1.0],
        "seconds": [seconds, seconds],
        "bytes": [payload],
        "payload": payload,
        "wire_s": None if kind in (RELEASED, RELEASED_BF16) else wait,
        "exposed_s": wait,
        "pruned_weights_left": 0,
        "spans": [spans, spans],
    }


def verdicts_of(**changed: dict) -> list[bool]:
    sides = {kind: side(kind, 10.0, 100.0, 3.0) for kind in KINDS}
    sides |= {kind: side(kind, 5.0, 10.0, 0.3) for kind in COMPACT}
    for name, facts in changed.items():
        kind = {"cached": CACHED, "after": COMPACT_AFTER}[name]
        sides[kind] = side(kind, **{"seconds": 5.0, "payload": 10.0, "wait": 0.3, **facts})
    rank = {"parameters": 1000, "unpruned": 100, "stage": 0, "sides": list(sides.values())}
    ranks = [rank | {"replica": 0}, rank | {"replica": 1}]
    rows = rows_of("1gbit", (1, 2), ranks)
    assert not any(row.wrong for row in rows)
    return [verdict.reached for verdict in verdicts(rows, judge_times=True)]


def test_bytes_times_and_compute_are_judged_each_by_its_own_target():
    assert verdicts_of() == [True] * 5
    assert verdicts_of(cached={"payload": 10.3}) == [False, True, True, True, True]
    assert verdicts_of(after={"wait": 0.4}) == [True, False, True, True, True]
    assert verdicts_of(cached={"wait": 0.6}) == [True, True, False, True, True]
    assert verdicts_of(cached={"compute": 4.3}) == [True, True, True, False, True]


def test_the_quickstart_names_axonn():
    done = start("quickstart.py", "--framework", "axonn", "--link-steps", "20")
    assert done.returncode == 2
    assert "which --framework axonn does not take" in " ".join(done.stderr.split())
    assert os.access(SCRIPTS / "quickstart.sh", os.R_OK)
