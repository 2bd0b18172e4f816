"""The benchmark of the kernels runs, checks what it times, and writes what a reader needs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.lib import kernel_floors, kernel_report
from scripts.lib.bench import Estimate
from scripts.lib.kernel_cases import PAIRS, make_case, make_dense, make_selection, ours, warm_up
from scripts.lib.kernel_step import BF16, DENSITIES, is_near, make_ways
from scripts.lib.kernel_threads import ThreadsRow
from scripts.lib.kernel_timing import SLOW_TURNS, Side, interleave, turns
from sparse_comm import kernels
from sparse_comm.kernels import native

pytestmark = pytest.mark.alone

SCRIPTS = Path(__file__).parent.parent / "scripts"
PATIENCE = 120  # seconds that a busy machine may take
TORCH_WAYS = {"pack": 4, "accumulate": 4, "expand": 3}


def run_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_kernels.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where a quick run wrote, and what it printed."""
    out = tmp_path_factory.mktemp("kernels")
    done = run_bench("--quick", "--numel", "30001", "--repeats", "2", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.fixture(autouse=True)
def usual_backend():
    yield
    kernels.use_backend(os.environ.get("SPARSE_COMM_KERNELS") or None)
    if not native.MISSING:
        native.use_instruction_set(native.instruction_sets()[-1])


# --- what a run writes ---------------------------------------------------------------------------


def facts_of(out: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((out / "kernels.json").read_text())
    return facts


def test_a_quick_run_writes_a_table_of_every_section_and_a_plot(quick):
    out, _ = quick
    text = (out / "kernels.md").read_text()
    for column in ("of the floor", "best of torch / this", "1 / 2", "over the first"):
        assert f" {column} |" in text
    for section in ("Targets", "Two threads", "Optimizer step", "Small tensors", "How to read it"):
        assert f"\n## {section}\n" in text
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert str(out) not in text + (out / "kernels.json").read_text()


def test_every_back_end_and_every_torch_operation_is_timed_at_each_density(quick):
    facts = facts_of(quick[0])
    rows = facts["kernels"]
    densities = facts["settings"]["densities"]
    for operation, pairs in PAIRS.items():
        hows = {row["how"] for row in rows if row["operation"] == operation}
        assert set(ours()) < hows
        assert len(hows) == len(ours()) + TORCH_WAYS[operation]
        of_this = [row for row in rows if row["operation"] == operation]
        assert len(of_this) == len(hows) * len(pairs) * len(densities)
    assert not any(row["wrong"] for row in rows + facts["steps"])


def estimates(found: Any) -> list[dict[str, float]]:
    if isinstance(found, dict) and found.keys() == {"value", "low", "high"}:
        return [found]
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [estimate for each in inner for estimate in estimates(each)]


@pytest.mark.parametrize("section", ["memory", "kernels", "threads", "steps", "calls", "targets"])
def test_all_times_and_ratios_are_finite_and_above_zero(quick, section):
    found = estimates(facts_of(quick[0])[section])
    assert found
    for estimate in found:
        assert 0 < estimate["low"] <= estimate["value"] <= estimate["high"] < math.inf


def test_every_target_is_printed_and_stands_in_the_table_as_reached_or_missed(quick):
    out, printed = quick
    targets = facts_of(out)["targets"]
    text = (out / "kernels.md").read_text()
    for what in ("pack bf16", "expand fp32", "2 threads", "no harm", "optimizer step, f = 0.5"):
        assert any(what in target["text"] for target in targets)
    words = {True: "reached", False: "missed"}
    for target in targets:
        word = words.get(target["reached"], target["reason"])
        assert f"  {word}" in printed and f": {target['text']}: " in printed
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {target['text']} |"))
        assert word in line


@pytest.mark.parametrize("arguments", [("--repeats", "1"), ("--numel", "4095")])
def test_settings_that_cannot_be_measured_are_refused(arguments, tmp_path):
    done = run_bench(*arguments, "--out", str(tmp_path))
    assert done.returncode == 2
    assert arguments[0] in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# --- what is timed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "pair"), [(name, pair) for name, pairs in PAIRS.items() for pair in pairs]
)
def test_a_wrong_result_is_noticed_and_the_right_ones_are_not_blamed(operation, pair):
    numel = 10_000
    dense, selection = make_dense(numel, 0), make_selection(numel, 0.1, 0)
    scratch = torch.zeros(4 * numel, dtype=torch.uint8)
    case = make_case(operation, pair, selection, dense, scratch, kernel_floors.load())

    def one_bit_off() -> torch.Tensor:
        result = case.sides["reference"].run()
        assert isinstance(result, torch.Tensor)
        result.view(torch.uint8)[-1] ^= 1
        return result

    wrong = {"idle": Side(lambda: case.out), "one bit off": Side(one_bit_off)}
    exact = warm_up(replace(case, sides=case.sides | wrong))
    assert [name for name, is_exact in exact.items() if not is_exact] == list(wrong)


def test_all_ways_to_step_give_the_same_weights():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in ((48, 64), (64, 24))]
    gradients = [torch.randn(w.shape, generator=generator).to(BF16) for w in weights]
    mask = [torch.rand(w.shape, generator=generator) < 0.3 for w in weights]
    ways = make_ways(weights, gradients, dict.fromkeys(DENSITIES, mask))
    for _ in range(3):
        for way in ways.values():
            way.step()
    first, *others = ways.values()
    for other in others:
        for a, b, m in zip(first.weights, other.weights, mask, strict=True):
            assert is_near(b, a.float())
            assert not is_near(b * 1.02, a.float())
            assert b[~m].count_nonzero() == 0 and b[m].count_nonzero() > 0


def test_slow_sides_have_few_turns_and_all_others_one_a_round():
    calls: list[str] = []
    sides = {
        name: Side(lambda name=name: calls.append(name), slow=name == "slow")
        for name in ("a", "b", "slow")
    }
    done: list[None] = []
    measured = interleave(sides, 12, lambda: done.append(None))
    assert len(calls) == len(done) == turns(sides, 12)
    assert len(measured["a"]) == len(measured["b"]) == 12
    assert len(measured["slow"]) == SLOW_TURNS
    orders = {tuple(x for x in calls[i : i + 3] if x != "slow") for i in range(0, len(calls), 3)}
    assert len(orders) > 1


# --- floors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["cc", "no-such-compiler", "false"])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 1000, 3 * 2**20 + 17])
def test_floors_move_every_byte_and_no_other_with_a_compiler_and_without(
    size, compiler, monkeypatch
):
    monkeypatch.setenv("CC", compiler)
    floors = kernel_floors.load()
    is_libc = "libc" in floors.about
    assert is_libc == (set(floors.copies) == {kernel_floors.LIBC})
    if compiler != "cc":
        assert is_libc and ("compile" in floors.about or "x86-64" in floors.about)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    for copy in floors.copies.values():
        buffer = torch.full((size + 64,), 7, dtype=torch.uint8)
        copy(buffer[:size], source)
        assert torch.equal(buffer[:size], source) and bool((buffer[size:] == 7).all())
    numbers = kernel_floors.content(torch.uint8, 0.5)
    for given in (kernel_floors.content(torch.uint8, 0), numbers):
        expected = given.repeat(size // kernel_floors.PERIOD + 1)[:size]
        for fill in floors.fills.values():
            buffer = torch.full((size + 64,), 7, dtype=torch.uint8)
            fill(buffer[:size], given)
            assert torch.equal(buffer[:size], expected) and bool((buffer[size:] == 7).all())


def test_what_fills_repeat_is_as_dense_as_asked():
    for density in (0.0, 0.1, 1.0):
        for dtype in (torch.bfloat16, torch.float32):
            given = kernel_floors.content(dtype, density)
            assert given.nbytes == kernel_floors.PERIOD
            assert abs(given.count_nonzero().item() / given.numel() - density) < 0.03


def test_a_floor_refuses_tensors_that_c_could_not_take():
    floors = kernel_floors.load()
    tensor = torch.zeros(256, dtype=torch.uint8)
    for bad in (tensor[1:], tensor[::2]):
        with pytest.raises(ValueError, match="contiguous tensor, aligned to 64 bytes"):
            next(iter(floors.fills.values()))(bad, tensor)


# --- two threads ---------------------------------------------------------------------------------


def thread_row(state: str, speedup: float, others: float) -> ThreadsRow:
    one = Estimate(1.0, 1.0, 1.0)
    return ThreadsRow("pack", 1000, state, one, one, Estimate(speedup, speedup, speedup), others)


def test_scaling_is_not_judged_while_others_use_the_cores_but_harm_is():
    def reached(speedup: float, others: float) -> list[bool | None]:
        rows = [thread_row("free", speedup, others), thread_row("busy", speedup, 1 + others)]
        return [verdict.reached for verdict in kernel_report.of_threads(rows)]

    assert reached(1.6, others=0.1) == [True, True, True]
    assert reached(1.4, others=0.1) == [False, True, True]
    assert reached(1.6, others=0.9) == [None, True, True]
    assert reached(0.8, others=0.9) == [None, False, False]


HOLD = """
import os, time
from lib.kernel_threads import busy_core
from lib.launch import stop_on_signals
stop_on_signals()  # as the benchmark does
with busy_core(max(os.sched_getaffinity(0))) as pid:
    print(pid, flush=True)
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_process_that_keeps_a_core_busy_ends_with_the_benchmark(number):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        cwd=SCRIPTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert holder.stdout is not None
        spinning = int(holder.stdout.readline())
        assert is_alive(spinning)
        holder.send_signal(number)
        holder.wait(timeout=PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while is_alive(spinning):
            assert time.monotonic() < deadline, f"{spinning} still spins"
            time.sleep(0.02)
    finally:
        holder.kill()
        holder.communicate()
