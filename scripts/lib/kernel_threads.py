"""Whether two threads help pack and expand, and that they do no harm where a core is busy.

Beside them stands how much faster two threads copy and fill memory, which is all they could gain.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_comm import kernels

from . import kernel_timing
from .bench import Estimate
from .kernel_cases import BF16, EXPAND, FP32, PACK, make_dense, make_selection, ours, use
from .kernel_floors import COPY, DATA_FILL, Floors, content
from .kernel_timing import Side, calls_that_take, interleave, seconds_of, turns
from .launch import SCRIPTS

DENSITY = 0.1
SIZES = (1 << 24, 1 << 25)  # entries: below and at where a second thread starts
TURN = 0.02  # seconds: what the scheduler takes from a thread at a time should even out in it
FREE, BUSY = "free", "busy"
SPIN = """
import os, sys
from lib.launch import die_with
die_with(int(sys.argv[1]))
os.sched_setaffinity(0, {int(sys.argv[2])})
print("spinning", flush=True)
while True:
    pass
"""


@dataclass(frozen=True)
class ThreadsRow:
    """One operation on one size, with one thread and with two."""

    operation: str
    numel: int
    other_core: str  # FREE, or BUSY: a process spins on one core
    one: Estimate  # seconds a call
    two: Estimate
    speedup: Estimate  # one over two
    others: float  # cores that other processes used meanwhile, the spinning one included


def sizes(numel: int) -> list[int]:
    return [*(size for size in SIZES if size < numel), numel]


def total_turns(numel: int, repeats: int) -> int:
    kernel_runs = len(sizes(numel)) * 2
    sides = dict.fromkeys(range((2 * kernel_runs + 2) * 2), Side(bool))
    return turns(sides, repeats)


def measure(
    numel: int, repeats: int, seed: int, floors: Floors, on_turn: Callable[[], None]
) -> list[ThreadsRow]:
    """bf16 dense tensors, f = 0.1: pack to bf16 values, expand from fp32 values."""
    use(ours()[0])
    cores = sorted(os.sched_getaffinity(0))
    runs = {
        (operation, size): run
        for size in sizes(numel)
        for operation, run in _operations(size, seed).items()
    }
    rows = []
    try:
        with ThreadPoolExecutor(1) as helper:
            memory = {(kind, numel): run for kind, run in _memory(numel, floors, helper).items()}
            rows += _measure(runs | memory, FREE, cores, repeats, on_turn)
        with busy_core(cores[-1]):
            rows += _measure(runs, BUSY, cores, repeats, on_turn)
    finally:
        torch.set_num_threads(1)
    return rows


def _operations(size: int, seed: int) -> dict[str, Callable[[], object]]:
    pattern = make_selection(size, DENSITY, seed).pattern
    dense = make_dense(size, seed)
    packed = torch.empty(pattern.nnz, dtype=BF16)
    expanded = torch.empty(size, dtype=BF16)
    return {
        PACK: partial(kernels.pack, dense[BF16], pattern, out=packed),
        EXPAND: partial(kernels.expand, dense[FP32][: pattern.nnz].clone(), pattern, out=expanded),
    }


def _memory(
    size: int, floors: Floors, helper: ThreadPoolExecutor
) -> dict[str, Callable[[], object]]:
    """The fastest copy and fill, half of it by the helper if torch is set to two threads."""

    def fastest(floors: dict[str, Callable], *tensors: Tensor) -> Callable:
        return min(floors.values(), key=lambda each: seconds_of(partial(each, *tensors)))

    dense, room = make_dense(size, 0)[BF16], torch.zeros(size, dtype=BF16)
    given = content(BF16, DENSITY)
    half = size // 2 // 4096 * 4096  # so that both are aligned
    fastest_copy, fastest_fill = (
        fastest(floors.copies, room, dense),
        fastest(floors.fills, room, given),
    )

    def by_both(run: Callable[[slice], object]) -> None:
        if torch.get_num_threads() == 1:
            run(slice(None))
            return
        other = helper.submit(run, slice(half, None))
        run(slice(half))
        other.result()

    def copy(part: slice) -> None:
        fastest_copy(room[part], dense[part])

    def fill(part: slice) -> None:
        fastest_fill(room[part], given)

    return {COPY: partial(by_both, copy), DATA_FILL: partial(by_both, fill)}


def _measure(
    runs: dict[tuple[str, int], Callable[[], object]],
    state: str,
    cores: list[int],
    repeats: int,
    on_turn: Callable[[], None],
) -> list[ThreadsRow]:
    torch.set_num_threads(1)
    sides = {
        (*key, threads): Side(run, partial(torch.set_num_threads, threads), calls)
        for key, run in runs.items()
        for calls in (calls_that_take(TURN, run),)
        for threads in (1, 2)
    }
    with _others_load(cores) as load:
        measured = interleave(sides, repeats, on_turn)
    rows = []
    for operation, numel in runs:
        one, two = (measured[operation, numel, threads] for threads in (1, 2))
        times = kernel_timing.median(one), kernel_timing.median(two)
        speedup = kernel_timing.ratio(one, two)
        rows.append(ThreadsRow(operation, numel, state, *times, speedup, load[0]))
    return rows


@contextmanager
def busy_core(core: int) -> Iterator[int]:
    """A process (its id) that spins on one core; it ends with the block, and with this process."""
    process = subprocess.Popen(
        [sys.executable, "-c", SPIN, str(os.getpid()), str(core)],
        cwd=SCRIPTS,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"spinning\n":
            raise RuntimeError(f"no process could be made to spin on core {core}")
        yield process.pid
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _others_load(cores: list[int]) -> Iterator[list[float]]:
    """The list holds, after the block, how many of the cores all other processes used in it."""
    load: list[float] = []
    start, busy, own = time.perf_counter(), _busy_seconds(cores), time.process_time()
    yield load
    own, busy = time.process_time() - own, _busy_seconds(cores) - busy
    load.append(max(0.0, busy - own) / (time.perf_counter() - start))


def _busy_seconds(cores: list[int]) -> float:
    """Seconds that these cores were not idle since the machine started, all together."""
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    ticks = 0
    for name, *counts in lines:
        if name in {f"cpu{core}" for core in cores}:
            user, nice, system, _idle, _waiting, *others = map(int, counts)
            ticks += user + nice + system + sum(others[:3])  # guests' time is part of user
    return ticks / os.sysconf("SC_CLK_TCK")
