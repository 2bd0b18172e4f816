"""One collective and one lasting buffer a bucket, under names that a profiler shows."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import mlp
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import backward, compact_mlp, wrapped

CASES: Cases = {}


def send_buffers(reduction: Reduction) -> list[Tensor]:
    return [kept.send for kept in reduction._kept.values() if kept.send is not None]


def profiled(ddp: DDP, rank: int, **options: Any) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        backward(ddp, rank)
    return list(profiler.events())


def soon(holds: Callable[[], bool]) -> None:
    """Once garbage is collected; a thread of the process group lets go of the last bucket late."""
    deadline = time.monotonic() + 10
    gc.collect()
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)
        gc.collect()


@case(CASES)
def buckets_keep_their_buffers_from_step_to_step(rank: int, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        reduction = Reduction(dtype)
        ddp = wrapped(compact_mlp(), reduction)
        addresses = []
        for step in range(5):
            backward(ddp, rank, step)
            buffers = send_buffers(reduction)
            addresses.append({buffer.data_ptr() for buffer in buffers})
            assert sum(b.nbytes for b in buffers) == 2 * sum(p.numel() for p in ddp.parameters())
        assert len(addresses[-1]) > 1
        assert addresses[1] == addresses[2] == addresses[3] == addresses[4]  # rebuilt after one


@case(CASES)
def gradients_stay_where_ddp_keeps_them(rank: int, world_size: int) -> None:
    ddp = wrapped(mlp(), Reduction())
    places = []
    for step in range(4):
        backward(ddp, rank, step)
        places.append([p.grad.data_ptr() for p in ddp.parameters()])
    assert places[1] == places[2] == places[3]


@case(CASES)
def gradients_that_travel_as_they_are_need_no_buffer(rank: int, world_size: int) -> None:
    for reduction in (Reduction(dtype=None), Reduction(torch.float32), Reduction(torch.float64)):
        backward(wrapped(mlp(), reduction), rank)
        assert send_buffers(reduction) == []


@case(CASES)
def buffers_go_with_the_models_that_share_the_reduction(rank: int, world_size: int) -> None:
    reduction = Reduction()
    first, second = wrapped(mlp(), reduction), wrapped(compact_mlp(), reduction)
    for step in range(3):
        backward(first, rank, step)
        backward(second, rank, step)
    entries = sum(p.numel() for ddp in (first, second) for p in ddp.parameters())
    assert sum(buffer.numel() for buffer in send_buffers(reduction)) == entries
    left = sum(p.numel() for p in second.parameters())
    del first
    soon(lambda: sum(buffer.numel() for buffer in send_buffers(reduction)) == left)
    del second
    soon(lambda: len(reduction._kept) == 0)


@case(CASES)
def another_dtype_from_one_step_to_the_next_takes_effect(rank: int, world_size: int) -> None:
    reduction = Reduction(dtype=None, stats=True)
    ddp = wrapped(mlp(), reduction)
    for dtype, name in ((None, "float32"), (torch.bfloat16, "bfloat16"), (None, "float32")):
        reduction.dtype = dtype
        backward(ddp, rank)
        assert {bucket["dtype"] for bucket in reduction.stats()["buckets"]} == {name}
    reduction.load_state_dict(Reduction(torch.float16).state_dict())
    backward(ddp, rank)
    assert {bucket["dtype"] for bucket in reduction.stats()["buckets"]} == {"float16"}
    assert sum(b.numel() for b in send_buffers(reduction)) == sum(
        p.numel() for p in ddp.parameters()
    )


@case(CASES)
def a_bucket_takes_exactly_one_collective(rank: int, world_size: int) -> None:
    for model in (mlp(), compact_mlp("transient")):
        for dtype in (None, torch.bfloat16):
            reduction = Reduction(dtype, stats=True)
            ddp = wrapped(model, reduction)
            backward(ddp, rank)
            reduction.reset_stats()
            seen = Counter(event.name for event in profiled(ddp, rank))
            buckets = len(reduction.stats()["buckets"])
            assert buckets > 1
            assert seen["gloo:all_reduce"] == buckets
            assert reduction.stats()["collectives"] == buckets


@case(CASES)
def a_profile_shows_every_phase(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    ddp = wrapped(mlp(), reduction)
    backward(ddp, rank)
    reduction.reset_stats()
    every = _ExperimentalConfig(profile_all_threads=True)  # gloo's, too
    seen = Counter(event.name for event in profiled(ddp, rank, experimental_config=every))
    buckets = len(reduction.stats()["buckets"])
    for phase in ("compress", "all_reduce", "decompress"):
        assert seen[f"sparse_comm::reduce.{phase}"] == buckets
    inner = wrapped(mlp(), Reduction(hook=(Reduction(None), reduce_hook)))
    seen = Counter(event.name for event in profiled(inner, rank))
    assert seen["sparse_comm::reduce.hook"] == 1  # DDP starts with one bucket


def below(event: Any) -> Iterator[Any]:
    for child in event.cpu_children:
        yield child
        yield from below(child)


@case(CASES)
def nothing_is_allocated_in_a_step(rank: int, world_size: int) -> None:
    """From the second step with the rebuilt buckets on: their buffers are new in the first."""
    ddp = wrapped(mlp(), Reduction())
    for step in range(3):
        backward(ddp, rank, step)

    def operators(events: list[Any], *phases: str) -> list[Any]:
        names = [f"sparse_comm::reduce.{phase}" for phase in phases]
        return [child for event in events if event.name in names for child in below(event)]

    ours = operators(profiled(ddp, rank, profile_memory=True), "compress", "all_reduce")
    assert {"aten::mul_", "aten::copy_"} <= {operator.name for operator in ours}
    # a number as a tensor may be
    assert max(operator.self_cpu_memory_usage for operator in ours) < 64
    every = _ExperimentalConfig(profile_all_threads=True)  # shows no memory
    gloos = operators(profiled(ddp, rank, experimental_config=every), "decompress")
    assert {operator.name for operator in gloos} == {"aten::copy_"}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_buffers(name, world_size):
    passed(__name__, world_size, name)
