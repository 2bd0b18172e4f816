"""Figures: bytes to the byte, steps told apart, times that fit into the time that passed."""

from __future__ import annotations

import gc
import time
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import sparse_comm
from sparse_comm import kernels
from sparse_comm.reduce import Reduction, reduce_hook
from sparse_comm.reduce.stats import Recorder, union_length
from tests.compact.models import batch, mlp, random_masks, seeded
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import backward, compact_mlp, wrapped

CASES: Cases = {}
TIMES = ("pack_s", "wire_s", "exposed_s")
DENSE = sum(p.numel() for p in mlp().parameters())


def watched(model: nn.Module, reduction: Reduction, **options: Any) -> DDP:
    ddp = wrapped(model, reduction, **options)
    reduction.watch(ddp)
    return ddp


# ---------------------------------------------------------------- bytes


@case(CASES)
def bytes_are_those_of_values_and_of_the_dense_model(rank: int, world_size: int) -> None:
    for model in (mlp(), compact_mlp(), compact_mlp("transient")):
        values = sum(p.numel() for p in model.parameters())
        for dtype, size in ((None, 4), (torch.bfloat16, 2), (torch.float16, 2)):
            reduction = Reduction(dtype, stats=True)
            ddp = watched(model, reduction)
            for step in range(3):
                backward(ddp, rank, step)
            figures = reduction.stats()
            assert figures["steps"] == 3
            assert figures["bytes_dense"] == 4 * DENSE
            assert figures["bytes_sent"] == size * values
            assert figures["total"]["bytes_dense"] == 12 * DENSE
            assert figures["total"]["bytes_sent"] == 3 * size * values
            buckets = figures["buckets"]  # of the last step, after DDP rebuilt them
            assert len(buckets) > 1
            assert figures["collectives"] == len(buckets)
            assert sum(bucket["bytes_dense"] for bucket in buckets) == 4 * DENSE
            assert sum(bucket["bytes_sent"] for bucket in buckets) == size * values
            assert all(bucket["wire_s"] > 0 for bucket in buckets)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(33, 33, bias=False)
        self.second = nn.Linear(33, 7, bias=False, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).bfloat16()).float()


@case(CASES)
def dense_gradients_count_in_their_own_dtype(rank: int, world_size: int) -> None:
    model = sparse_comm.compact(seeded(Halves), random_masks(seeded(Halves)))
    reduction = Reduction(stats=True)
    ddp = watched(model, reduction)
    backward(ddp, rank)
    figures = reduction.stats()
    assert figures["bytes_dense"] == 33 * 33 * 4 + 33 * 7 * 2
    assert figures["bytes_sent"] == 2 * sum(p.numel() for p in model.parameters())


@case(CASES)
def dense_bytes_of_a_model_nobody_watched_are_unknown_not_wrong(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    ddp = wrapped(compact_mlp(), reduction)
    backward(ddp, rank)
    figures = reduction.stats()
    assert figures["bytes_dense"] is figures["total"]["bytes_dense"] is None
    assert figures["bytes_sent"] > 0
    reduction.watch(ddp)
    reduction.reset_stats()
    backward(ddp, rank)
    assert reduction.stats()["bytes_dense"] == 4 * DENSE
    plain = Reduction(stats=True)  # nothing to know about a plain model
    backward(wrapped(mlp(), plain), rank)
    assert plain.stats()["bytes_dense"] == 4 * DENSE


# ---------------------------------------------------------------- times


@case(CASES)
def times_fit_into_the_time_that_backward_took(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    ddp = watched(compact_mlp("transient"), reduction)
    for step in range(4):
        reduction.reset_stats()
        loss = ddp(batch(step)[0]).square().sum()
        start = time.perf_counter()
        loss.backward()
        took = time.perf_counter() - start
        figures = reduction.stats()
        assert all(0 < figures[name] < took for name in TIMES)
        assert figures["total"] == {name: figures[name] for name in figures["total"]}
        assert max(b["wire_s"] for b in figures["buckets"]) <= figures["wire_s"]
        assert figures["wire_s"] <= sum(b["wire_s"] for b in figures["buckets"]) + 1e-9


@case(CASES)
def waiting_for_a_late_peer_is_exposed_time(rank: int, world_size: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    reduction = Reduction(stats=True)
    ddp = wrapped(mlp(), None)

    def telling(state, bucket):
        future = reduce_hook(state, bucket)
        if bucket.is_last() and rank == 0:
            store.add("handed over", 1)
        return future

    ddp.register_comm_hook(reduction, telling)
    for step in range(2):  # forward waits for no peer once the buckets are rebuilt
        backward(ddp, rank, step)
    reduction.reset_stats()
    if rank == world_size - 1:
        while store.add("handed over", 0) < 3:
            time.sleep(0.001)
        time.sleep(0.05)
    backward(ddp, rank)
    figures = reduction.stats()
    if rank == 0:
        assert figures["exposed_s"] >= 0.05
        assert figures["wire_s"] >= 0.05


@case(CASES)
def pack_time_is_of_backward_passes_only_and_all_of_them(rank: int, world_size: int) -> None:
    earlier: list[float] = []
    later: list[float] = []
    stops = [kernels.observe(lambda name, s: earlier.append(s) if name == "pack" else None)]
    reduction = Reduction(stats=True)
    stops += [kernels.observe(lambda name, s: later.append(s) if name == "pack" else None)]
    plain, ddp = watched(mlp(), reduction), watched(compact_mlp(), reduction)
    ddp.module.load_state_dict(sparse_comm.dense_state_dict(ddp.module))
    assert len(earlier) > 0
    backward(plain, rank)
    assert reduction.stats()["pack_s"] == 0
    earlier.clear()
    later.clear()
    reduction.reset_stats()
    with ddp.no_sync():
        ddp(batch(0)[0]).sum().backward()
    ddp(batch(0)[0]).sum().backward()
    for stop in stops:
        stop()
    assert len(earlier) == 2 * len(random_masks(mlp()))
    assert reduction.stats()["steps"] == 1
    # who observes later is told later
    assert sum(earlier) <= reduction.stats()["pack_s"] <= sum(later)


# ---------------------------------------------------------------- steps


@case(CASES)
def steps_are_backward_passes_that_reduced(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    ddp = watched(compact_mlp(), reduction)
    for step in range(1, 4):
        with ddp.no_sync():
            ddp(batch(step)[0]).sum().backward()
        ddp(batch(step)[0]).sum().backward()
        assert reduction.stats()["steps"] == step
        assert reduction.stats()["steps"] == step  # asking twice counts nothing twice
    reduction.reset_stats()
    empty = reduction.stats()
    assert empty["steps"] == 0
    assert empty["buckets"] == []
    assert empty["bytes_sent"] is empty["wire_s"] is None
    assert set(empty["total"].values()) == {0}
    backward(ddp, rank)
    assert reduction.stats()["steps"] == 1


@case(CASES)
def models_that_take_turns_make_steps_of_their_own(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    models = [watched(compact_mlp(), reduction) for _ in range(2)]
    for step in range(3):
        for ddp in models:
            backward(ddp, rank, step)
    figures = reduction.stats()
    assert figures["steps"] == 6
    assert figures["bytes_dense"] == 4 * DENSE


@case(CASES)
def a_backward_pass_that_fails_leaves_no_step(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    ddp = watched(mlp(), reduction)
    backward(ddp, rank)
    backward(ddp, rank, 1)

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("stop here")

    ddp.module[0].weight.register_hook(fail)
    with pytest.raises(ValueError, match="stop here"):
        backward(ddp, rank, 2)  # some buckets are under way
    again = watched(mlp(), reduction)
    for step in range(3):
        backward(again, rank, step)
    assert reduction.stats()["steps"] == 5
    assert reduction.stats()["bytes_dense"] == 4 * DENSE


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_figures(name, world_size):
    passed(__name__, world_size, name)


# ---------------------------------------------------------------- in one process

Intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda i: (i[0], sum(i))))


@given(Intervals)
def test_the_union_of_intervals_counts_every_moment_once(intervals):
    moments = {moment for start, end in intervals for moment in range(start, end)}
    assert union_length(intervals) == len(moments)


def test_figures_that_nobody_asked_for_are_refused_and_nothing_observes():
    before = list(kernels.backends._observers)
    reduction = Reduction()
    assert kernels.backends._observers == before
    for call in (reduction.stats, reduction.reset_stats, lambda: reduction.write_stats(print, 0)):
        with pytest.raises(RuntimeError, match=r"keeps no figures.*stats=True"):
            call()


def test_observation_ends_with_the_reduction():
    before = list(kernels.backends._observers)
    reduction = Reduction(stats=True)
    assert len(kernels.backends._observers) == len(before) + 1
    del reduction
    gc.collect()
    assert kernels.backends._observers == before


def test_memory_is_bounded_however_many_steps():
    recorder = Recorder()
    facts = {"dtype": torch.float32, "on_cpu": True, "bytes_dense": 8, "bytes_sent": 4}
    for _ in range(1500):
        record = recorder.handed_over(0, collectives=1, **facts)
        record.sent()
        record.completed()
    assert recorder.figures()["steps"] == 1500
    assert recorder.figures()["total"]["bytes_sent"] == 6000
    assert len(recorder._recent) == 1000


def test_times_on_a_gpu_are_unknown_not_wrong():
    recorder = Recorder()
    record = recorder.handed_over(
        0, dtype=torch.float32, on_cpu=False, bytes_dense=8, bytes_sent=4, collectives=1
    )
    record.sent()
    record.completed()
    figures = recorder.figures()
    assert figures["bytes_sent"] == 4
    assert figures["wire_s"] is figures["exposed_s"] is figures["buckets"][0]["wire_s"] is None
