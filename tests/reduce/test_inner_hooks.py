"""A hook that the user has already does the reducing, on buckets of the smaller dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

from sparse_comm.reduce import Reduction
from tests.compact.models import mlp
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import (
    backward,
    compact_mlp,
    reduced_by_hand,
    same,
    same_on_all_ranks,
    wrapped,
)

CASES: Cases = {}
ONE_BUCKET = 4096  # PowerSGD hangs or crashes with several buckets on gloo


def power_sgd() -> PowerSGDState:
    return PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)


def hooked(model: torch.nn.Module, state: Any, hook: Any, **options: Any) -> DDP:
    ddp = wrapped(model, None, **options)
    ddp.register_comm_hook(state, hook)
    return ddp


class Seen:
    """State of ``mine``: what it was given."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []
        self.sizes: list[int] = []


def mine(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """A user's hook: sums, and halves afterwards, out of place."""
    state.dtypes.append(bucket.buffer().dtype)
    state.sizes.append(sum(g.numel() for g in bucket.gradients()))
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0] / dist.get_world_size())


mine.__annotations__.clear()  # DDP refuses annotations that are strings


@case(CASES)
def the_users_hook_gets_the_bucket_in_the_dtype_and_keeps_its_state(
    rank: int, world_size: int
) -> None:
    for model in (mlp(), compact_mlp()):
        for dtype in (None, torch.bfloat16, torch.float16):
            state = Seen()
            ddp = wrapped(model, Reduction(dtype, hook=(state, mine)))
            for step in range(3):
                reduced = backward(ddp, rank, step)
                assert same_on_all_ranks(reduced)
                assert all(g is not None and g.dtype == torch.float32 for g in reduced)
                if world_size == 2:  # halving is exact, before or after the sum
                    wire = dtype or torch.float32
                    assert same(reduced, reduced_by_hand(model, rank, wire, step=step))
            assert set(state.dtypes) == {dtype or torch.float32}
            assert sum(state.sizes) == 3 * sum(p.numel() for p in model.parameters())


@case(CASES)
def torchs_own_hooks_give_what_they_give_alone(rank: int, world_size: int) -> None:
    model = compact_mlp()
    for hook in (default_hooks.allreduce_hook, default_hooks.fp16_compress_hook):
        alone = hooked(model, None, hook)
        inside = wrapped(model, Reduction(dtype=None, hook=(None, hook)))
        for step in range(3):
            assert same(backward(inside, rank, step), backward(alone, rank, step))
    ddp = wrapped(model, Reduction(torch.bfloat16, hook=(None, default_hooks.allreduce_hook)))
    reduced = backward(ddp, rank)
    assert same_on_all_ranks(reduced)
    if world_size == 2:
        assert same(reduced, reduced_by_hand(model, rank, torch.bfloat16))


@case(CASES)
def torchs_wrapper_may_stand_inside(rank: int, world_size: int) -> None:
    inner = default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)
    for dtype in (None, torch.bfloat16):
        alone = hooked(mlp(), None, inner)
        inside = wrapped(mlp(), Reduction(dtype, hook=(None, inner)))
        for step in range(3):
            want, got = backward(alone, rank, step), backward(inside, rank, step)
            assert same_on_all_ranks(got)
            assert dtype is not None or same(got, want)
            for a, b in zip(want, got, strict=True):
                torch.testing.assert_close(b, a, rtol=2**-6, atol=0.1)


@case(CASES)
def power_sgd_in_one_bucket(rank: int, world_size: int) -> None:
    model = mlp()
    one = {"bucket_cap_mb": ONE_BUCKET}
    alone = hooked(model, power_sgd(), powerSGD_hook, **one)
    state = power_sgd()
    inside = wrapped(model, Reduction(dtype=None, hook=(state, powerSGD_hook)), **one)
    for step in range(5):
        assert same(backward(inside, rank, step), backward(alone, rank, step))
    assert state.iter >= 2  # it has gone over to low rank
    assert state.error_dict[0].any()
    half = wrapped(model, Reduction(torch.bfloat16, hook=(power_sgd(), powerSGD_hook)), **one)
    for step in range(5):
        assert same_on_all_ranks(backward(half, rank, step))


@case(CASES)
def a_hook_that_fails_fails_backward_and_leaves_the_reduction_usable(
    rank: int, world_size: int
) -> None:
    def failing(state, bucket):
        raise ValueError("no such luck")

    reduction = Reduction(hook=(None, failing))
    with pytest.raises(ValueError, match="no such luck"):
        backward(wrapped(mlp(), reduction), rank)

    def failing_later(state, bucket):
        future = torch.futures.Future()
        future.set_exception(ValueError("no such luck later"))
        return future

    reduction.hook = (None, failing_later)
    with pytest.raises(Exception, match="no such luck later"):
        backward(wrapped(mlp(), reduction), rank)
    reduction.hook = None
    assert same_on_all_ranks(backward(wrapped(mlp(), reduction), rank))


@case(CASES)
def figures_leave_out_what_only_the_users_hook_knows(rank: int, world_size: int) -> None:
    reduction = Reduction(hook=(None, default_hooks.allreduce_hook), stats=True)
    ddp = wrapped(mlp(), reduction)
    backward(ddp, rank)
    figures = reduction.stats()
    assert (figures["steps"], figures["bytes_sent"], figures["collectives"]) == (1, None, None)
    assert figures["wire_s"] > 0
    assert figures["bytes_dense"] == 4 * sum(p.numel() for p in mlp().parameters())


@case(CASES)
def a_resumed_run_goes_on_where_the_saved_one_stopped(rank: int, world_size: int) -> None:
    """PowerSGD's error feedback, warm start and random numbers come back.

    They belong to places in DDP's buckets, which it rebuilds after its first step: so each model
    here makes a step before its state counts.
    """

    def started() -> tuple[Reduction, DDP]:
        reduction = Reduction(dtype=None, hook=(power_sgd(), powerSGD_hook))
        ddp = wrapped(mlp(), reduction, bucket_cap_mb=ONE_BUCKET)
        backward(ddp, rank)
        return reduction, ddp

    def steps(ddp: DDP, first: int, last: int) -> list[Any]:
        return [backward(ddp, rank, step) for step in range(first, last)]

    saved, ddp = started()
    steps(ddp, 1, 5)
    state = copy.deepcopy(saved.state_dict())
    whole = steps(ddp, 5, 7)
    resumed, ddp = started()
    resumed.load_state_dict(state)
    assert all(map(same, steps(ddp, 5, 7), whole))
    _, ddp = started()
    assert not any(map(same, steps(ddp, 5, 7), whole))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_inner_hooks(name, world_size):
    passed(__name__, world_size, name)


def failing_peer(rank: int, world_size: int) -> None:
    ddp = wrapped(mlp(), Reduction())
    backward(ddp, rank)
    if rank == 1:
        raise ValueError("this rank leaves")
    backward(ddp, rank, 1)


def test_a_peer_that_dies_fails_backward_instead_of_hanging_it():
    from tests.launch import outcomes

    survivor, left = outcomes(failing_peer, 2, timeout=60)
    assert isinstance(left.error, ValueError)
    assert isinstance(survivor.error, RuntimeError)
    assert "backward" in survivor.traceback


def test_a_hook_that_is_no_pair_is_refused():
    for hook in (mine, [None, mine], (mine,), (mine, None)):
        with pytest.raises(TypeError, match=r"hook must be a \(state, hook\) pair"):
            Reduction(hook=hook)  # type: ignore[arg-type]
