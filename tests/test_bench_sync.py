"""``bench_sync.py`` has every peer in its tables, correct averages and bytes, honest verdicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.lib import bench
from scripts.lib.sync_report import DENSE_BF16, DENSE_FP32, OURS, SAMO, Row, rows_of, verdicts
from tests.links import links_possible

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_sync.py"
OF_EACH_DENSITY = ["COO all-reduce, fp32", *SAMO, "sparse_comm fp32", "sparse_comm bf16"]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("sync")
    links = ("--links", "1gbit", "loopback")
    done = start("--quick", "--repeats", "2", *links, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_every_peer_stands_in_the_table_of_every_link(written):
    out, printed = written
    rows = json.loads((out / "sync.json").read_text())["rows"]
    links = ["1gbit", "loopback"] if links_possible() else ["loopback"]
    expected = [(kind, None) for kind in (DENSE_FP32, DENSE_BF16, "PowerSGD rank 4, fp32")]
    expected += [(kind, density) for density in (0.1, 0.2) for kind in OF_EACH_DENSITY]
    for link in links:
        of_link = [(row["kind"], row["density"]) for row in rows if row["link"] == link]
        assert sorted(of_link, key=str) == sorted(expected, key=str)
    assert len(rows) == len(links) * len(expected)
    text = (out / "sync.md").read_text()
    for kind, _ in expected:
        assert text.count(f"| {kind} |") + text.count(f"| **{kind}** |") >= len(links)
    assert ("1 Gbit/s was not measured" in text) == (len(links) == 1)
    assert (out / "sync.png").stat().st_size > 10_000
    assert "Targets" in printed


def test_bytes_counted_are_those_of_the_formula_where_no_other_program_sends(written):
    rows = json.loads((written[0] / "sync.json").read_text())["rows"]
    if not links_possible():  # then ``lo`` is shared with everything on this machine
        assert all(row["sent"] >= row["payload"] for row in rows)
        return
    for row in rows:
        assert row["payload"] <= row["sent"] <= 1.1 * row["payload"] + 20_000, row


def test_only_lossy_peers_are_further_from_the_average_than_rounding(written):
    rows = json.loads((written[0] / "sync.json").read_text())["rows"]
    for row in rows:
        if row["kind"].startswith("PowerSGD"):
            assert 1e-2 < row["error"] < 1
        elif row["kind"] in ("dense fp32", "COO all-reduce, fp32", "sparse_comm fp32"):
            assert row["error"] < 1e-6
        else:
            assert 1e-4 < row["error"] < 1e-2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--links", "fast"), "--links has 'fast'; it takes loopback, or a speed such as 1gbit"),
        (("--repeats", "1"), "--repeats is 1; an interval needs at least 2"),
    ],
)
def test_options_that_cannot_work_are_refused(arguments, said):
    done = start(*arguments)
    assert done.returncode == 2 and said in done.stderr


def rows(seconds: dict[tuple[str, float | None], float], link: str) -> list[Row]:
    """Rows of a run in which every turn of a peer took the given seconds."""
    peers = [
        {"kind": kind, "density": density, "payload": 1, "collectives": 1, "error": 0.0}
        | {"seconds": [time, time, time], "bytes": [10, 10, 10]}
        for (kind, density), time in seconds.items()
    ]
    return rows_of(link, [{"peers": peers}, {"peers": peers}])


def reached(ours: float, samo: float, link: str = "1gbit") -> dict[str, bool]:
    dense = {(DENSE_FP32, None): 2.0, (DENSE_BF16, None): 1.0}
    sparse = {(OURS, 0.1): ours, (SAMO[0], 0.1): samo}
    return {
        verdict.text.partition(" against ")[2]: verdict.reached
        for verdict in verdicts(rows(dense | sparse, link))
    }


def test_targets_are_reached_or_missed_by_the_ratio_of_medians():
    assert reached(ours=1 / 9.1, samo=1.0) == {DENSE_BF16: True, DENSE_FP32: True, SAMO[0]: True}
    assert reached(ours=1 / 8.9, samo=1.0) == {DENSE_BF16: False, DENSE_FP32: True, SAMO[0]: True}
    assert reached(ours=1 / 8.4, samo=1.0) == {DENSE_BF16: False, DENSE_FP32: False, SAMO[0]: True}
    assert reached(ours=0.2, samo=1.0, link="loopback") == {DENSE_BF16: True, SAMO[0]: True}
    assert reached(ours=0.3, samo=1.0, link="loopback") == {DENSE_BF16: False, SAMO[0]: True}


def test_samo_must_be_twice_as_slow_unless_the_byte_limit_is_reached():
    assert reached(ours=0.2, samo=0.41)[SAMO[0]]
    assert not reached(ours=0.2, samo=0.39)[SAMO[0]]
    assert reached(ours=0.11, samo=0.11)[SAMO[0]]  # 0.1 of the bytes of dense in 0.11 of its time


def test_a_wrong_average_is_a_wrong_row():
    row = rows({(DENSE_FP32, None): 2.0, (DENSE_BF16, None): 1.0}, "1gbit")[0]
    assert not row.wrong
    for error, wrong in ((1e-5, True), (float("nan"), True), (1e-8, False)):
        assert Row(**(vars(row) | {"error": error})).wrong == wrong


def test_the_slower_rank_counts_and_the_loopback_carries_the_bytes_of_both():
    turns = [
        {"seconds": [1.0, 4.0], "bytes": [100, 120]},
        {"seconds": [2.0, 3.0], "bytes": [100, 120]},
    ]
    assert bench.over_ranks(turns, "veth") == {"seconds": [2.0, 4.0], "bytes": [100, 120]}
    assert bench.over_ranks(turns, "lo") == {"seconds": [2.0, 4.0], "bytes": [50, 60]}


def test_intervals_hold_the_estimate_and_pairs_that_vary_together_give_a_narrow_one():
    noise = np.random.default_rng(0).lognormal(sigma=0.5, size=40)
    together = bench.ratio(list(2 * noise), list(noise))
    assert together.value == pytest.approx(2) and together.high - together.low < 1e-9
    apart = bench.ratio(list(2 * noise), list(noise[::-1]))
    assert apart.low < apart.value < apart.high and apart.high - apart.low > 0.1
    middle = bench.median(list(noise))
    assert middle.low <= middle.value == np.median(noise) <= middle.high
