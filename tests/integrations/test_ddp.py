"""DDP around a compact model trains what DDP around the masked dense model trains.

Bit for bit on two ranks. On three, gloo adds in an order that depends on where an entry stands in
its bucket, and there are fewer entries: within rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sparse_comm.integrations.pytorch import distributed_data_parallel
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.nn.parallel.distributed import _MixedPrecision

import sparse_comm
from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import (
    ConvNet,
    Masks,
    Tied,
    Twice,
    batch,
    mlp,
    pair,
    pruned_are_zero,
    random_masks,
    same_nnz_masks,
    same_weights,
    seeded,
    train,
)
from tests.integrations.cases import Cases, case, passed

MODES = ("cached", "transient")
CASES: Cases = {}


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)


def assert_trains_like_masked_dense(
    rank: int,
    world_size: int,
    make: Callable[[], nn.Module] = mlp,
    masks: Masks | None = None,
    wrap: Callable[..., DDP] = DDP,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    prepare: Callable[[DDP], Any] = lambda ddp: None,
    steps: int = 5,
    **options: Any,
) -> None:
    """In both modes: losses and weights, and on all ranks the same values."""
    for weights in MODES:
        dense, compact, used = pair(make, masks, weights=weights)
        losses = []
        for model, given in ((dense, used), (compact, None)):
            ddp = (DDP if model is dense else wrap)(model, **options)
            prepare(ddp)
            optimizer = make_optimizer(model)
            losses.append(train(ddp, optimizer, given, steps=steps, seed=1000 * (rank + 1)))
        if world_size == 2:
            assert losses[0] == losses[1]
            assert same_weights(dense, compact)
        else:
            assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert pruned_are_zero(compact)
        assert on_all_ranks([p.detach() for p in compact.parameters()])


def on_all_ranks(tensors: list[Tensor]) -> bool:
    """Whether all ranks have the same bits."""
    mine = [t.flatten().tolist() for t in tensors]
    others: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(others, mine)
    return all(other == mine for other in others)


# ---------------------------------------------------------------- training


@case(CASES)
def compact_alone_is_enough(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size)


@case(CASES)
def the_integration_wraps_with_gradients_in_the_buckets(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, wrap=distributed_data_parallel)
    ddp = distributed_data_parallel(sparse_comm.compact(mlp(), random_masks(mlp())))
    assert isinstance(ddp, DDP)
    assert ddp.gradient_as_bucket_view
    assert not distributed_data_parallel(
        mlp(), gradient_as_bucket_view=False
    ).gradient_as_bucket_view


@case(CASES)
def gradients_may_be_views_of_buckets(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(
        rank, world_size, gradient_as_bucket_view=True, bucket_cap_mb=0.002
    )
    model = sparse_comm.compact(mlp(), random_masks(mlp()))
    ddp = DDP(model, gradient_as_bucket_view=True)
    train(ddp, adamw(model), steps=2)
    # one bucket holds them all, in fp32 and of values only: that is what goes over the wire
    storages = {p.grad.untyped_storage()._cdata: p.grad for p in model.parameters()}
    (gradient,) = storages.values()
    assert gradient.untyped_storage().nbytes() == 4 * sum(p.numel() for p in model.parameters())


@case(CASES)
def convolutions_with_batch_norm(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, lambda: seeded(ConvNet))


@case(CASES)
def tied_weights_and_a_module_used_twice(rank: int, world_size: int) -> None:
    for make in (Tied, Twice):
        assert_trains_like_masked_dense(rank, world_size, lambda m=make: seeded(m))


@case(CASES)
def parameters_of_which_nothing_or_all_is_left(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    masks["0.weight"].fill_(True)
    masks["2.weight"].fill_(False)
    assert_trains_like_masked_dense(rank, world_size, masks=masks)


@case(CASES)
def gradients_accumulate_without_communication(rank: int, world_size: int) -> None:
    for weights in MODES:
        dense, compact, masks = pair(weights=weights)
        losses = []
        for model, given in ((dense, masks), (compact, None)):
            ddp = DDP(model)
            calls = 0

            def forward(x: Tensor, ddp: DDP = ddp) -> Tensor:
                nonlocal calls
                calls += 1
                with ddp.no_sync() if calls % 3 else contextlib.nullcontext():
                    return ddp(x)

            how: dict[str, Any] = {"steps": 3, "accumulate": 3, "seed": 1000 * (rank + 1)}
            losses.append(train(ddp, adamw(model), given, forward=forward, **how))
        equal = losses[0] if world_size == 2 else pytest.approx(losses[0], rel=1e-5)
        assert losses[1] == equal
        assert on_all_ranks([p.detach() for p in compact.parameters()])
        with ddp.no_sync():
            compact(batch(rank)[0]).sum().backward()
        assert not on_all_ranks([p.grad for p in compact.parameters()])


class Branches(nn.Module):
    """Uses one of two layers, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(33, 33), nn.Linear(33, 33), nn.Linear(33, 7)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head((self.a if self.calls % 2 else self.b)(x).tanh())


@case(CASES)
def unused_parameters_are_found(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(
        rank, world_size, lambda: seeded(Branches), find_unused_parameters=True
    )


@case(CASES)
def a_static_graph(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, lambda: seeded(Twice), static_graph=True)


@case(CASES)
def communication_hooks_see_values_only(rank: int, world_size: int) -> None:
    hook = default_hooks.fp16_compress_hook
    for weights in MODES:
        dense, compact, masks = pair(weights=weights)
        seen: list[int] = []

        def counting(state, bucket, seen=seen):  # DDP refuses annotations that are strings
            seen.append(bucket.buffer().numel())
            return hook(state, bucket)

        losses = []
        for model, given in ((dense, masks), (compact, None)):
            ddp = DDP(model)
            ddp.register_comm_hook(None, hook if model is dense else counting)
            losses.append(train(ddp, adamw(model), given, steps=3, seed=1000 * (rank + 1)))
        assert losses[1] == (losses[0] if world_size == 2 else pytest.approx(losses[0], rel=1e-3))
        assert sum(seen) == 3 * sum(p.numel() for p in compact.parameters())


@case(CASES)
def the_zero_redundancy_optimizer(rank: int, world_size: int) -> None:
    """It writes other ranks' values by broadcast, which bumps no version."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    assert_trains_like_masked_dense(
        rank,
        world_size,
        make_optimizer=lambda m: ZeroRedundancyOptimizer(
            m.parameters(), torch.optim.AdamW, lr=1e-2
        ),
    )


# ---------------------------------------------------------------- with a reduction


@case(CASES)
def a_reduction_of_a_compact_model_is_that_of_the_masked_dense_model(
    rank: int, world_size: int
) -> None:
    for dtype in (None, torch.bfloat16):
        for weights in MODES:
            dense, compact, masks = pair(weights=weights)
            losses = []
            for model, given in ((dense, masks), (compact, None)):
                ddp = distributed_data_parallel(model, reduction=Reduction(dtype))
                losses.append(train(ddp, adamw(model), given, steps=5, seed=1000 * (rank + 1)))
            if world_size == 2:
                assert losses[0] == losses[1]
                assert same_weights(dense, compact)
            else:
                assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype is None else 1e-2)
            assert on_all_ranks([p.detach() for p in compact.parameters()])


@case(CASES)
def the_bucket_size_comes_from_the_link_unless_it_is_given(rank: int, world_size: int) -> None:
    def bytes_cap(**options: Any) -> int:
        ddp = distributed_data_parallel(seeded(Wide), **options)
        caps: list[Any] = [None] * world_size
        dist.all_gather_object(caps, ddp.bucket_bytes_cap)
        assert len(set(caps)) == 1
        return caps[0]

    default = bytes_cap()
    assert default == 25 * 2**20
    chosen = bytes_cap(reduction=Reduction(torch.bfloat16))
    assert 2**20 <= chosen <= 2 * default  # as bf16 travels at half the bytes that DDP counts
    assert chosen != default
    assert bytes_cap(reduction=Reduction(), bucket_cap_mb=0.5) == 2**19
    hook = (None, default_hooks.allreduce_hook)  # which may want one bucket, as PowerSGD does
    assert bytes_cap(reduction=Reduction(hook=hook)) == default
    group = [dist.new_group([member]) for member in range(world_size)][rank]
    alone = distributed_data_parallel(mlp(), group, Reduction(process_group=group))
    assert alone.bucket_bytes_cap == default


class Wide(nn.Module):
    """Two megabytes of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(700, 700)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@case(CASES)
def a_compiled_model_reduces_as_an_eager_one(rank: int, world_size: int) -> None:
    losses = []
    for compiled in (False, True):
        model = sparse_comm.compact(mlp(), random_masks(mlp()))
        ddp = distributed_data_parallel(model, reduction=Reduction(dtype=None))
        run = torch.compile(ddp, backend="aot_eager") if compiled else ddp
        losses.append(train(ddp, adamw(model), forward=run, steps=3, seed=1000 * (rank + 1)))
        assert on_all_ranks([p.detach() for p in model.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@case(CASES)
def figures_know_the_dense_model(rank: int, world_size: int) -> None:
    reduction = Reduction(stats=True)
    compact = sparse_comm.compact(mlp(), random_masks(mlp()))
    ddp = distributed_data_parallel(compact, reduction=reduction)
    train(ddp, adamw(compact), steps=3)
    figures = reduction.stats()
    assert figures["steps"] == 3
    assert figures["bytes_dense"] == 4 * sum(p.numel() for p in mlp().parameters())
    assert figures["bytes_sent"] == 2 * sum(p.numel() for p in compact.parameters())


@case(CASES)
def what_does_not_fit_a_reduction_is_refused(rank: int, world_size: int) -> None:
    group = dist.new_group(list(range(world_size)))
    for options in ({"process_group": group}, {"reduction": Reduction(process_group=group)}):
        with pytest.raises(ValueError, match="different process groups: give both the same"):
            distributed_data_parallel(mlp(), **{"reduction": Reduction(), **options})
    mesh = init_device_mesh("cpu", (world_size,))
    of_mesh = Reduction(process_group=mesh.get_group())
    assert distributed_data_parallel(mlp(), reduction=of_mesh, device_mesh=mesh)
    mixed = _MixedPrecision(param_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="mixed_precision registers a communication hook"):
        distributed_data_parallel(mlp(), reduction=Reduction(), mixed_precision=mixed)
    ddp = distributed_data_parallel(mlp(), reduction=Reduction())
    with pytest.raises(RuntimeError, match="can only be called once"):
        ddp.register_comm_hook(Reduction(), reduce_hook)


# ---------------------------------------------------------------- what is communicated


@case(CASES)
def wrapping_gives_every_rank_the_values_of_rank_0(rank: int, world_size: int) -> None:
    for weights in MODES:
        model = sparse_comm.compact(mlp(), random_masks(mlp()), weights=weights)
        x, _ = batch(0)
        expected = model(x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank)
        model(x)  # a cached weight is of this rank's values now
        assert torch.equal(DDP(model)(x), expected)


@case(CASES)
def patterns_are_no_buffers_and_nothing_is_broadcast_in_forward(rank: int, world_size: int) -> None:
    model = sparse_comm.compact(mlp(), random_masks(mlp()))
    assert list(model.buffers()) == []
    ddp = DDP(model)
    assert not ddp.will_sync_module_buffers()
    conv = sparse_comm.compact(seeded(ConvNet), random_masks(seeded(ConvNet)))
    names = [name for name, _ in conv.named_buffers()]
    assert names == [name for name, _ in seeded(ConvNet).named_buffers()]


@case(CASES)
def a_collective_on_values_counts_after_values_changed(rank: int, world_size: int) -> None:
    for weights in MODES:
        model = sparse_comm.compact(mlp(), random_masks(mlp()), weights=weights)
        x, _ = batch(0)
        expected = model(x)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(rank)
            model(x)
            for p in model.parameters():
                dist.broadcast(p, src=0)
        sparse_comm.values_changed(model)
        assert torch.equal(model(x), expected)


# ---------------------------------------------------------------- masks that differ


def assert_every_rank_refuses(call: Callable[[], Any], *parts: str) -> None:
    """In seconds, with one message, and the group still works."""
    with pytest.raises(ValueError, match="masks differ between ranks") as caught:
        call()
    messages: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(caught.value))
    assert set(messages) == {messages[0]}
    assert all(part in messages[0] for part in parts), messages[0]


@case(CASES)
def other_masks_of_equal_nnz_stop_every_rank(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    if rank == 1:
        masks["2.weight"] = same_nnz_masks(masks)["2.weight"]
    model = sparse_comm.compact(mlp(), masks)
    others = "ranks 0, 2" if world_size == 3 else "rank 0"
    for call in (sparse_comm.check_masks, distributed_data_parallel):
        said = f"'2.weight' is masked differently on rank 1 than on {others}".split(" than ")[0]
        assert_every_rank_refuses(lambda c=call: c(model), said, "broadcast_masks")
        assert_every_rank_refuses(lambda c=call: c(model), "on rank 1", others)


@case(CASES)
def masks_missing_on_one_rank_stop_every_rank(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    if rank == world_size - 1:
        del masks["4.weight"]
    model = sparse_comm.compact(mlp(), masks)
    others = "ranks 0-1" if world_size == 3 else "rank 0"
    for call in (sparse_comm.check_masks, distributed_data_parallel):
        said = f"'4.weight' is masked on {others} but not on rank {world_size - 1}"
        assert_every_rank_refuses(lambda c=call: c(model), said)
    plain = mlp() if rank == 0 else sparse_comm.compact(mlp(), random_masks(mlp()))
    assert_every_rank_refuses(lambda: sparse_comm.check_masks(plain), "but not on rank 0")


@case(CASES)
def equal_masks_pass_in_the_group_that_has_them(rank: int, world_size: int) -> None:
    masks = random_masks(mlp(), seed=1 if rank < world_size - 1 else 2)
    model = sparse_comm.compact(mlp(), masks)
    group = dist.new_group(list(range(world_size - 1)))
    if rank < world_size - 1:
        sparse_comm.check_masks(model, group)
        distributed_data_parallel(model, process_group=group)
    dist.barrier()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_under_ddp(name, world_size):
    passed(__name__, world_size, name)
