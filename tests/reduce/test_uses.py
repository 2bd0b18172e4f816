"""The hook under all that DDP offers, beside other hooks, and shared by models."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.join import Join
from torch.utils.checkpoint import checkpoint

import sparse_comm
from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import (
    Twice,
    batch,
    mlp,
    random_masks,
    seeded,
)
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import (
    backward,
    compact_mlp,
    gradients,
    own_gradients,
    same,
    same_on_all_ranks,
    wrapped,
)

CASES: Cases = {}


# ---------------------------------------------------------------- ways of using DDP


class Branches(nn.Module):
    """The second branch is used where it is said to be."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 7)
        self.never = nn.Linear(33, 33)
        self.use_b = True

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.head((hidden + self.b(x)) if self.use_b else hidden)


@case(CASES)
def a_rank_without_gradients_for_a_layer_adds_zeros(rank: int, world_size: int) -> None:
    model = seeded(Branches)
    model.use_b = rank != 0
    for options in ({"gradient_as_bucket_view": True}, {"gradient_as_bucket_view": False}):
        options = {"find_unused_parameters": True, **options}
        plain = wrapped(model, None, **options)
        hooked = wrapped(model, Reduction(dtype=None), **options)
        lossy = wrapped(model, Reduction(), **options)
        for step in range(3):
            expected = backward(plain, rank, step)
            assert same(backward(hooked, rank, step), expected)
            rounded = backward(lossy, rank, step)
            assert same_on_all_ranks(rounded)
            for got, want in zip(rounded, expected, strict=True):
                assert (got is None) == (want is None)
                if want is not None and got is not None:
                    torch.testing.assert_close(got, want, rtol=2**-6, atol=0.05)
            assert model.use_b or hooked.module.b.weight.grad.any()  # the other ranks' gradient


@case(CASES)
def ranks_that_join_early_add_zeros_to_what_the_others_reduce(rank: int, world_size: int) -> None:
    """The divisor stays the number of all ranks, as with torch's own hooks."""
    model = compact_mlp()
    losses = []
    for hook in (default_hooks.allreduce_hook, reduce_hook, None):
        ddp = wrapped(model, None)
        reduction = Reduction(dtype=None, stats=True)
        if hook is not None:
            ddp.register_comm_hook(None if hook is not reduce_hook else reduction, hook)
        optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
        with Join([ddp], divide_by_initial_world_size=True):
            for step in range(2 + 2 * rank):
                backward(ddp, rank, step)
                optimizer.step()
        losses.append([p.detach().clone() for p in ddp.parameters()])
        if hook is reduce_hook:
            assert reduction.stats()["steps"] == 2 * world_size  # zeros are steps, too
    assert same(losses[1], losses[2])
    assert world_size > 2 or same(losses[0], losses[1])
    assert same_on_all_ranks(losses[1])


@case(CASES)
def what_accumulates_without_sync_is_reduced_with_it(rank: int, world_size: int) -> None:
    for dtype in (None, torch.bfloat16):
        model = compact_mlp()
        plain, hooked = wrapped(model, None), wrapped(model, Reduction(dtype))
        for step in range(3):
            found = []
            for ddp in (plain, hooked):
                ddp.zero_grad()
                for part in range(3):
                    with ddp.no_sync() if part < 2 else contextlib.nullcontext():
                        x, _ = batch(1000 * rank + 10 * step + part)
                        ddp(x).square().sum().backward()
                found.append(gradients(ddp))
            if dtype is None and world_size == 2:
                assert same(*found)
            for want, got in zip(*found, strict=True):
                assert want is not None
                torch.testing.assert_close(
                    got, want, rtol=1e-5 if dtype is None else 2**-6, atol=0.2
                )
            assert same_on_all_ranks(found[1])


class Nested(nn.Module):
    """Reentrant checkpointing, whose backward passes nest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(33, 33), nn.Linear(33, 33)
        self.head = nn.Linear(33, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.requires_grad_())
        return self.head(checkpoint(self.middle, x, use_reentrant=True))


@case(CASES)
def static_graphs_and_nested_backward_passes(rank: int, world_size: int) -> None:
    for make in (Twice, Nested):
        model = seeded(make)
        plain = wrapped(model, None, static_graph=True)
        reduction = Reduction(dtype=None, stats=True)
        hooked = wrapped(model, reduction, static_graph=True)
        for step in range(4):
            assert same(backward(hooked, rank, step), backward(plain, rank, step))
            assert reduction.stats()["steps"] == step + 1


@case(CASES)
def buckets_without_entries_are_not_sent(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    for mask in masks.values():
        mask.fill_(False)
    model = sparse_comm.compact(mlp(), masks)
    for dtype in (None, torch.bfloat16):
        reduction = Reduction(dtype, stats=True)
        hooked = wrapped(model, reduction, bucket_cap_mb=1e-6)
        plain = wrapped(model, None, bucket_cap_mb=1e-6)
        for step in range(2):
            got, want = backward(hooked, rank, step), backward(plain, rank, step)
            assert dtype is not None or same(got, want)
            assert same_on_all_ranks(got)
        buckets = reduction.stats()["buckets"]
        assert {(bucket["bytes_sent"] > 0, bucket["collectives"]) for bucket in buckets} == {
            (True, 1),
            (False, 0),
        }


@case(CASES)
def one_rank_keeps_its_gradients_exactly(rank: int, world_size: int) -> None:
    groups = [dist.new_group([member]) for member in range(world_size)]
    model = compact_mlp()
    reduction = Reduction(process_group=groups[rank], stats=True)
    ddp = wrapped(model, reduction, process_group=groups[rank])
    for step in range(2):
        assert same(backward(ddp, rank, step), own_gradients(model, rank, step))
    figures = reduction.stats()
    assert figures["steps"] == 2
    assert (figures["bytes_sent"], figures["collectives"], figures["wire_s"]) == (0, 0, 0)


@case(CASES)
def only_the_ranks_of_the_group_take_part(rank: int, world_size: int) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        model = mlp()
        plain = wrapped(model, None, process_group=group)
        hooked = wrapped(model, Reduction(None, group), process_group=group)
        assert same(backward(hooked, rank), backward(plain, rank))
    dist.barrier()


# ---------------------------------------------------------------- two hooks


@case(CASES)
def a_second_hook_on_one_model_is_refused_and_the_first_goes_on(rank: int, world_size: int) -> None:
    model = mlp()
    ddp = wrapped(model, Reduction(dtype=None))
    with pytest.raises(RuntimeError, match="can only be called once"):
        ddp.register_comm_hook(Reduction(), reduce_hook)
    assert same(backward(ddp, rank), backward(wrapped(model, None), rank))


@case(CASES)
def a_bucket_that_is_under_way_is_refused_with_what_to_do(rank: int, world_size: int) -> None:
    def twice(state, bucket):
        reduce_hook(state, bucket)
        return reduce_hook(state, bucket)

    reduction = Reduction()
    ddp = wrapped(mlp(), None)
    ddp.register_comm_hook(reduction, twice)
    with pytest.raises(RuntimeError, match=r"reduced already.*Reduction\(hook=\("):
        backward(ddp, rank)
    # another model may go on with the same reduction
    again = wrapped(mlp(), reduction)
    assert same_on_all_ranks(backward(again, rank))


@case(CASES)
def a_hook_around_it_may_wait_for_its_future(rank: int, world_size: int) -> None:
    def waiting(state, bucket):
        future = reduce_hook(state, bucket)
        future.wait()
        return future

    model = compact_mlp()
    ddp, patient = wrapped(model, Reduction()), wrapped(model, None)
    patient.register_comm_hook(Reduction(), waiting)
    for step in range(3):
        assert same(backward(patient, rank, step), backward(ddp, rank, step))


@case(CASES)
def torchs_wrapper_may_stand_around_it(rank: int, world_size: int) -> None:
    model = mlp()
    outside = wrapped(model, None)
    outside.register_comm_hook(
        Reduction(dtype=None), default_hooks.fp16_compress_wrapper(reduce_hook)
    )
    torchs = wrapped(model, None)
    torchs.register_comm_hook(None, default_hooks.fp16_compress_hook)
    for step in range(3):
        got, want = backward(outside, rank, step), backward(torchs, rank, step)
        assert same_on_all_ranks(got)
        assert world_size > 2 or same(got, want)


@case(CASES)
def two_models_in_one_backward_share_a_reduction(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    models = [mlp(), compact_mlp()]
    together = [wrapped(model, reduction) for model in models]
    alone = [wrapped(model, Reduction()) for model in models]
    for step in range(3):
        x, _ = batch(1000 * rank + step)
        for ddp in together:
            ddp.zero_grad()
        sum(ddp(x).square().sum() for ddp in together).backward()
        for ddp, other in zip(together, alone, strict=True):
            assert same(gradients(ddp), backward(other, rank, step))
    assert reduction.stats()["steps"] == 3


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_uses(name, world_size):
    passed(__name__, world_size, name)


# ---------------------------------------------------------------- refused


def test_a_state_that_is_no_reduction_is_refused():
    with pytest.raises(TypeError, match=r"needs a Reduction as its state, got NoneType"):
        reduce_hook(None, None)  # type: ignore[arg-type]


def test_single_gradients_of_the_python_reducer_are_refused():
    line = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"DDP's buckets, got a tuple.*python_reducer"):
        reduce_hook(Reduction(), (line.weight, line.weight))  # type: ignore[arg-type]
