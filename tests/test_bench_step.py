"""``bench_step.py`` writes a row for every training, with losses and bytes that are checked."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from scripts.lib.model import GPT
from scripts.lib.step_kinds import (
    CACHED,
    COMPUTE_BF16,
    COMPUTE_FP32,
    COO,
    DENSE_BF16,
    DENSE_BF16_TUNED,
    DENSE_FP32,
    KINDS,
    MASKED_DENSE,
    OURS,
    POWERSGD,
    ROUNDING,
    TRANSIENT,
)
from scripts.lib.step_report import Row, costs_of, limits, rows_of, verdicts
from tests.links import links_possible

pytestmark = pytest.mark.alone

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_step.py"
SIDES = [MASKED_DENSE, CACHED, TRANSIENT]


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("step")
    options = ("--links", "loopback", "--density", "0.2", "--compute", *ROUNDING)
    done = start("--quick", *options, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def facts(written) -> dict:
    return json.loads((written[0] / "step.json").read_text())


def test_every_training_stands_in_the_table_and_in_the_plot(written, facts):
    out, printed = written
    assert [row["kind"] for row in facts["rows"]] == 2 * list(KINDS)
    assert [row["compute"] for row in facts["rows"][:: len(KINDS)]] == list(ROUNDING)
    assert [cost["kind"] for cost in facts["one_process"]] == 2 * SIDES
    text = (out / "step.md").read_text()
    for kind in (*KINDS, *SIDES):
        assert f"| {kind} |" in text or f"| **{kind}** |" in text
    assert (out / "step.png").stat().st_size > 10_000
    assert "Targets, which --quick cannot judge" in printed


def test_losses_are_finite_and_all_but_powersgd_train_as_dense_does(facts):
    for row in facts["rows"]:
        assert len(row["losses"]) == facts["settings"]["steps"]
        assert all(math.isfinite(loss) for loss in [*row["losses"], row["held_out"]])
        assert row["pruned_weights_left"] == 0
        assert row["difference"] <= ROUNDING[row["compute"]] or row["kind"] == POWERSGD
    found = {row["kind"]: row for row in facts["rows"] if row["compute"] == COMPUTE_FP32}
    in_bf16 = {row["kind"]: row for row in facts["rows"] if row["compute"] == COMPUTE_BF16}
    assert in_bf16[DENSE_FP32]["losses"] != found[DENSE_FP32]["losses"]
    assert found[POWERSGD]["difference"] > 10 * found[OURS]["difference"]
    assert found[DENSE_BF16]["losses"] != found[DENSE_FP32]["losses"]
    for cost in facts["one_process"]:
        assert cost["difference"] <= ROUNDING[cost["compute"]]


def test_bytes_are_those_of_the_formula_where_no_other_program_sends(facts):
    found = {row["kind"]: row for row in facts["rows"]}
    dense, ours = found[DENSE_BF16]["payload"], found[OURS]["payload"]
    assert ours == pytest.approx(0.2 * dense, rel=1e-3)  # f counts what has no mask
    assert found[DENSE_FP32]["payload"] == 2 * dense == 2 * found[DENSE_BF16_TUNED]["payload"]
    model = GPT(facts["settings"]["layers"], facts["settings"]["width"], 256)
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)]
    unmasked = sum(p.numel() for p in model.parameters()) - sum(linear)
    unpruned = ours // 2 - unmasked
    assert found[COO]["payload"] == (8 + 4) * unpruned + 4 * unmasked  # int64 index, fp32
    for row in facts["rows"]:
        assert row["sent"] >= row["payload"]
        if links_possible():  # else ``lo`` is shared with everything on this machine
            assert row["sent"] <= 1.1 * row["payload"] + 50_000, row


def test_every_phase_takes_time_and_kernels_do_in_compact_training_only(facts):
    for row in facts["rows"]:
        assert all(length > 0 for length in row["phases"].values())
    for cost in facts["one_process"]:
        if cost["kind"] == MASKED_DENSE:
            assert cost["times"]["pack"] == cost["times"]["expand"] == 0
            continue
        assert 0 < cost["times"]["pack"] < cost["forward_backward"]["value"]
        assert 0 < cost["times"]["expand"] < cost["forward_backward"]["value"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--links", "fast"), "--links has 'fast'; it takes loopback, or a speed such as 1gbit"),
        (("--density", "0.1", "1"), "--density has 1.0; it must be at least 0.02 and below 1"),
        (("--steps", "3"), "--steps is 3; the first 2 are not timed, and an interval needs 2"),
        (("--tokens", "257"), "--tokens is 257; it must be from 1 to 256"),
    ],
)
def test_options_that_cannot_work_are_refused(arguments, said):
    done = start(*arguments)
    assert done.returncode == 2 and said in " ".join(done.stderr.split())


# --- the report, of runs made up -----------------------------------------------------------------


def phases(total: float, exposed: float = 0.0, mask: float = 0.0) -> dict[str, float]:
    rest = (total - exposed - mask) / 2
    return {
        "forward": rest,
        "backward": rest,
        "exposed": exposed,
        "optimizer": 0.0,
        "mask": mask,
    }


def peer(kind: str, seconds: float, loss: float = 1.0, **facts: object) -> dict:
    measured = {
        "kind": kind,
        "payload": 1,
        "bucket_mb": None,
        "losses": [2.0, loss],
        "phases": [phases(seconds), phases(seconds)],
        "bytes": [10.0],
        "held_out": loss,
        "pruned_weights_left": 0,
    }
    return measured | facts


def rows(
    ours: dict,
    link: str = "1gbit",
    density: float = 0.1,
    tuned: float = 0.9,
    compute: str = COMPUTE_FP32,
) -> list[Row]:
    dense = [peer(DENSE_FP32, 2.0), peer(DENSE_BF16, 1.0), peer(DENSE_BF16_TUNED, tuned)]
    ranks = [{"peers": [*dense, ours]}, {"peers": [*dense, ours]}]
    return rows_of((link, density, compute), ranks)


def reached(rows: list[Row]) -> list[bool]:
    return [verdict.reached for verdict in verdicts(rows, [])]


def test_the_target_is_judged_against_the_better_dense_bf16():
    assert reached(rows(peer(OURS, 0.9 / 4.6))) == [True, True]
    assert reached(rows(peer(OURS, 1.0 / 4.6))) == [False, True]
    assert reached(rows(peer(OURS, 1.0 / 4.6), tuned=1.1)) == [True, True]
    assert reached(rows(peer(OURS, 0.01), link="loopback")) == []
    assert reached(rows(peer(OURS, 0.01), density=0.2)) == []


def test_other_losses_miss_the_target_and_make_a_row_wrong():
    for compute, limit in ROUNDING.items():
        for loss, same in ((1.0 + 0.9 * limit, True), (1.0 + 1.1 * limit, False)):
            measured = rows(peer(OURS, 0.1, loss), compute=compute)
            assert reached(measured) == [True, same]
            assert measured[-1].wrong != same
    assert rows(peer(OURS, 0.1, math.nan))[-1].wrong
    assert rows(peer(OURS, 0.1, pruned_weights_left=1))[-1].wrong
    assert not rows(peer(POWERSGD, 0.1, 1.5))[-1].wrong  # it is lossy: the table says how much


def test_the_slower_rank_counts_and_phases_are_those_of_the_rank_that_waits_less():
    early = peer(OURS, 0.0, phases=[phases(1.0, exposed=0.8)] * 2, bytes=[100.0])
    late = peer(OURS, 0.0, phases=[phases(1.2, exposed=0.2, mask=0.1)] * 2, bytes=[140.0])
    dense = [peer(kind, 1.0) for kind in (DENSE_FP32, DENSE_BF16, DENSE_BF16_TUNED)]
    for link, sent in (("1gbit", 120.0), ("loopback", 60.0)):  # lo carries the bytes of both
        row = rows_of(
            (link, 0.1, COMPUTE_FP32), [{"peers": [*dense, early]}, {"peers": [*dense, late]}]
        )[-1]
        assert row.time.value == pytest.approx(1.2) and row.sent == sent
        assert row.phases["exposed"] == pytest.approx(0.2)
        assert row.phases["optimizer"] == pytest.approx(0.1)  # with the mask


def test_a_note_says_what_free_communication_would_give():
    dense = [peer(kind, 2.0, phases=[phases(2.0, exposed=1.5)] * 2) for kind in KINDS[:3]]
    [note] = limits(rows_of(("1gbit", 0.1, COMPUTE_FP32), [{"peers": dense}, {"peers": dense}]))
    assert "computes for 500 ms" in note and "4.00 times as fast" in note


def test_costs_are_judged_with_and_without_what_masks_take():
    def side(kind: str, total: float, mask: float = 0.0) -> dict:
        timed = phases(total, mask=mask) | {"pack": 0.0, "expand": 0.0}
        return peer(kind, 0.0, phases=[timed] * 2)

    dense, cached, transient = SIDES
    sides = [side(dense, 1.1, mask=0.1), side(cached, 1.05), side(transient, 1.07)]
    costs = costs_of({"density": 0.1, "compute": COMPUTE_FP32, "sides": sides})
    assert [round(cost.step_ratio.value, 3) for cost in costs] == [1.0, 0.955, 0.973]
    judged = [verdict.reached for verdict in verdicts([], costs)]
    assert judged == [False, False, True, True, True, True]
