"""FSDP2 shards the values of a compact model, and trains what it trains of the masked dense model.

Bit for bit on two ranks, and within rounding on three, whose sums gloo makes in another order.
Sizes are odd: shards are uneven.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sparse_comm.integrations.pytorch import fully_shard
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import sparse_comm
from sparse_comm.reduce import Reduction
from tests.compact.models import (
    Masks,
    Tied,
    Twice,
    batch,
    mlp,
    pair,
    random_masks,
    same_nnz_masks,
    same_state,
    seeded,
    train,
)
from tests.compact.test_live_bytes import DENSE, WIDTH, Live, deep
from tests.integrations.cases import Cases, case, passed

MODES = ("cached", "transient")
CASES: Cases = {}


def shard(model: nn.Module, with_: Callable[..., Any] = fully_shard, **options: Any) -> nn.Module:
    """Each layer that has parameters, then the model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weights='cached' keeps")
        layers = [m for m in model.children() if list(m.parameters())]
        for module in (*layers, model) if isinstance(model, nn.Sequential) else (model,):
            with_(module, **options)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)


def full_state(model: nn.Module) -> dict[str, Any]:
    """State dict of a sharded dense model, gathered."""
    return {
        n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()
    }


def sharded_masks(model: nn.Module, masks: Masks) -> Masks:
    """For ``train`` of a sharded dense model."""
    return {
        name: distribute_tensor(masks[name], p.device_mesh, p.placements)
        for name, p in model.named_parameters()
        if name in masks
    }


def assert_trains_like_masked_dense(
    rank: int,
    world_size: int,
    make: Callable[[], nn.Module] = mlp,
    masks: Masks | None = None,
    with_: Callable[..., Any] = fully_shard,
    modes: tuple[str, ...] = MODES,
    rel: float = 1e-5,
    how: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Losses, weights and moments; the tolerance ``rel`` is for more than two ranks."""
    how = {"steps": 4, "seed": 1000 * (rank + 1), **(how or {})}
    for weights in modes:
        dense, compact, used = pair(make, masks, weights=weights)
        shard(dense, torch_fully_shard, **options)
        shard(compact, with_, **options)
        of_dense, of_compact = adamw(dense), adamw(compact)
        expected = train(dense, of_dense, sharded_masks(dense, used), **how)
        losses = train(compact, of_compact, **how)
        state = sparse_comm.dense_state_dict(compact)
        if world_size == 2:
            assert losses == expected
            assert same_state(state, full_state(dense))
        else:
            assert losses == pytest.approx(expected, rel=rel)
        for name, mask in sparse_comm.masks_of(compact).items():
            assert not state[name][~mask].any()
        for p in compact.parameters():
            moment = of_compact.state[p].get("exp_avg", p)
            assert type(moment) is type(p)
            assert moment.shape == p.shape


# ---------------------------------------------------------------- training


@case(CASES)
def compact_alone_is_enough(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, with_=torch_fully_shard)


@case(CASES)
def values_may_stay_gathered_until_backward(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, reshard_after_forward=False)


@case(CASES)
def values_may_be_released_after_forward(rank: int, world_size: int) -> None:
    assert_trains_like_masked_dense(rank, world_size, reshard_after_forward=True)


@case(CASES)
def parameters_are_shards_of_values(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    model = shard(sparse_comm.compact(mlp(), masks, weights="transient"))
    for name, p in model.named_parameters():
        assert isinstance(p, DTensor)
        if name in masks:
            assert p.shape == (int(masks[name].sum()),)
    mine = sum(p.to_local().numel() for p in model.parameters())
    total: list[Any] = [None] * world_size
    dist.all_gather_object(total, mine)
    assert sum(total) == sum(p.numel() for p in model.parameters())
    report = sparse_comm.summary(model)
    assert report.parameter_bytes == 4 * mine


@case(CASES)
def the_root_alone_with_tied_weights_and_a_module_used_twice(rank: int, world_size: int) -> None:
    for make in (Tied, Twice):
        assert_trains_like_masked_dense(rank, world_size, lambda m=make: seeded(m))


@case(CASES)
def mixed_precision_policies(rank: int, world_size: int) -> None:
    """The values are gathered as bf16; layers see a dense bf16 weight."""
    for reduce_dtype in (torch.float32, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        assert_trains_like_masked_dense(rank, world_size, rel=2**-8, mp_policy=policy)


@case(CASES)
def gradients_accumulate_without_communication(rank: int, world_size: int) -> None:
    for weights in MODES:
        dense, compact, masks = pair(weights=weights)
        losses = []
        for model in (dense, compact):
            shard(model, torch_fully_shard)
            given = sharded_masks(model, masks) if model is dense else None
            calls = 0

            def forward(x: torch.Tensor, model: Any = model) -> torch.Tensor:
                nonlocal calls
                calls += 1
                model.set_requires_gradient_sync(calls % 2 == 0)
                return model(x)

            how: dict[str, Any] = {"steps": 3, "accumulate": 2, "seed": 1000 * (rank + 1)}
            losses.append(train(model, adamw(model), given, forward=forward, **how))
        assert losses[1] == (losses[0] if world_size == 2 else pytest.approx(losses[0], rel=1e-5))


@case(CASES)
def clipping_by_norm(rank: int, world_size: int) -> None:
    """The total norm is that of the dense gradient; its rounding is of another order."""
    norms: list[float] = []

    def clip(parameters: Any) -> None:
        norm = nn.utils.clip_grad_norm_(parameters, 0.3)
        norms.append(norm.full_tensor().item())

    losses = []
    dense, compact, masks = pair(weights="transient")
    for model in (dense, compact):
        shard(model)
        given = sharded_masks(model, masks) if model is dense else None
        how: dict[str, Any] = {"steps": 4, "seed": 1000 * (rank + 1), "clip": clip}
        losses.append(train(model, adamw(model), given, **how))
    assert min(norms) > 0.3
    assert norms[4:] == pytest.approx(norms[:4], rel=1e-5)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@case(CASES)
def parameters_of_which_nothing_one_entry_or_all_is_left(rank: int, world_size: int) -> None:
    """An empty one is left out of sharding, and meets no DTensor in foreach kernels or clipping."""
    masks = random_masks(mlp())
    masks["0.weight"].fill_(True)
    masks["2.weight"].fill_(False)
    masks["4.weight"] = torch.arange(7 * 65).reshape(7, 65) == 100
    for weights in MODES:
        dense, compact, _ = pair(masks=masks, weights=weights)
        shard(dense)
        shard(compact)
        clip = lambda p: nn.utils.clip_grad_norm_(p, 100.0)  # noqa: E731
        how: dict[str, Any] = {"steps": 4, "seed": 1000 * (rank + 1), "clip": clip}
        expected = train(dense, adamw(dense), sharded_masks(dense, masks), **how)
        assert train(compact, adamw(compact), **how) == pytest.approx(expected, rel=1e-5)
        empty = dict(compact.named_parameters())["2.weight"]
        assert (type(empty), empty.shape) == (nn.Parameter, (0,))
        assert not sparse_comm.dense_state_dict(compact)["2.weight"].any()


@case(CASES)
def a_mesh_of_two_dimensions(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (1, world_size), mesh_dim_names=("replicate", "shard"))
    assert_trains_like_masked_dense(rank, world_size, modes=("transient",), mesh=mesh)


# ---------------------------------------------------------------- with a reduction


@case(CASES)
def a_reduction_is_the_reduce_dtype_of_the_policy(rank: int, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert_trains_like_masked_dense(
            rank,
            world_size,
            modes=("transient",),
            rel=2**-6,
            with_=lambda m, d=dtype, **_: fully_shard(m, reduction=Reduction(d)),
            mp_policy=MixedPrecisionPolicy(reduce_dtype=dtype),
        )
    # as they are: by the dtype, or because they are as small
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for policy, reduction in ((None, Reduction(None)), (half, Reduction(torch.float16))):
        options = {"mp_policy": policy} if policy else {}
        assert_trains_like_masked_dense(
            rank,
            world_size,
            modes=("transient",),
            rel=2**-6 if policy else 1e-5,
            with_=lambda m, r=reduction, **o: fully_shard(m, reduction=r, **o),
            **options,
        )


@case(CASES)
def figures_are_of_the_reduce_scatters(rank: int, world_size: int) -> None:
    for dtype, size in ((None, 4), (torch.bfloat16, 2)):
        reduction = Reduction(dtype, stats=True)
        compact = sparse_comm.compact(mlp(), random_masks(mlp()), weights="transient")
        values = [p.numel() for p in compact.parameters()]
        model = shard(compact, reduction=reduction)
        optimizer = adamw(model)
        train(model, optimizer, steps=3)
        figures = reduction.stats()
        assert figures["steps"] == 3
        assert figures["bytes_dense"] == 4 * sum(p.numel() for p in mlp().parameters())
        padded = sum(-(-n // world_size) * world_size for n in values)  # to equal shards
        assert figures["bytes_sent"] == size * padded
        assert figures["collectives"] == len(figures["buckets"]) == 4  # a layer each
        assert all(figures["total"][name] > 0 for name in ("pack_s", "wire_s", "exposed_s"))
        # gloo's reduce-scatter blocks, so that none of it is hidden
        assert figures["wire_s"] <= figures["exposed_s"]
        reduction.reset_stats()
        start = time.perf_counter()
        train(model, optimizer, steps=1, first=3)
        took = time.perf_counter() - start
        assert reduction.stats()["exposed_s"] < took


@case(CASES)
def what_fsdp2_cannot_do_with_a_reduction_is_refused(rank: int, world_size: int) -> None:
    hook = (None, default_hooks.allreduce_hook)
    for reduction in (Reduction(hook=hook), Reduction(process_group=dist.group.WORLD)):
        with pytest.raises(ValueError, match="a Reduction without hook and process_group"):
            fully_shard(mlp(), reduction=reduction)
    model = sparse_comm.compact(mlp(), random_masks(mlp()), weights="cached")
    for param_dtype in (None, torch.bfloat16):
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
        message = r"reduces in torch\.float32, the reduction in torch\.bfloat16"
        with pytest.raises(ValueError, match=message):
            fully_shard(model, reduction=Reduction(), mp_policy=policy)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    assert sparse_comm.summary(model).cache_bytes > 0  # nothing has happened


# ---------------------------------------------------------------- memory


@case(CASES)
def no_transient_weight_outlives_its_layer(rank: int, world_size: int) -> None:
    for reshard in (True, False):
        model = shard(deep("transient"), reshard_after_forward=reshard)
        x = torch.randn(4, WIDTH, requires_grad=True)
        with Live(DENSE // 2) as live:
            out = model(x)
            assert live.bytes() == 0
            assert DENSE <= live.peak <= 2 * DENSE
            out.sum().backward()
            assert live.bytes() == 0
            assert live.peak <= 3 * DENSE


@case(CASES)
def cached_weights_are_announced_and_are_right(rank: int, world_size: int) -> None:
    """That they are right is what all cases of training say; they live until backward."""
    model = deep("cached")
    for layer in model[::2]:
        with pytest.warns(UserWarning, match=r"cached.*dense weights of 'weight'.*transient"):
            fully_shard(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(deep("transient"))
    with Live(DENSE // 2) as live:
        out = model(torch.randn(4, WIDTH, requires_grad=True))
        assert live.bytes() == 8 * DENSE
        out.sum().backward()
        del out
        assert live.bytes() == 0


@case(CASES)
def caches_of_values_that_torch_sharded_are_given_up_aloud(rank: int, world_size: int) -> None:
    model = sparse_comm.compact(mlp(), random_masks(mlp()), weights="cached")
    torch_fully_shard(model)
    with pytest.warns(UserWarning, match="keeps no cache of sharded values.*transient"):
        model(batch(0)[0])
    assert sparse_comm.summary(model).cache_bytes == 0


# ---------------------------------------------------------------- refused


@case(CASES)
def dense_states_are_refused_once_sharded(rank: int, world_size: int) -> None:
    model = shard(sparse_comm.compact(mlp(), random_masks(mlp()), weights="transient"))
    before = sparse_comm.dense_state_dict(model)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded here.*before fully_shard"):
        model.load_state_dict(mlp().state_dict())
    after = sparse_comm.dense_state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@case(CASES)
def masks_that_differ_stop_every_rank(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    other = same_nnz_masks(masks) if rank == 1 else masks
    missing = {n: m for n, m in masks.items() if rank != 1 or n != "2.weight"}
    for mine, said in (
        ({**masks, "2.weight": other["2.weight"]}, "'2.weight' is masked differently on rank"),
        (missing, "'2.weight' is masked on rank"),
    ):
        model = sparse_comm.compact(mlp(), mine, weights="transient")
        with pytest.raises(ValueError, match="masks differ between ranks") as caught:
            fully_shard(model)
        messages: list[Any] = [None] * world_size
        dist.all_gather_object(messages, str(caught.value))
        assert set(messages) == {messages[0]}
        assert said in messages[0]
        assert not any(isinstance(p, DTensor) for p in model.parameters())
        mesh = init_device_mesh("cpu", (world_size,))
        with pytest.raises(ValueError, match="masks differ between ranks"):
            fully_shard(model[2], mesh=mesh)


@case(CASES)
def layouts_do_not_change_under_sharding(rank: int, world_size: int) -> None:
    masks = random_masks(mlp())
    plain = shard(mlp(), torch_fully_shard)
    with pytest.raises(ValueError, match=r"'0\.weight' is a DTensor: call compact.*before fully_"):
        sparse_comm.compact(plain, masks)
    model = shard(sparse_comm.compact(mlp(), masks, weights="transient"))
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded; densify the model before"):
        sparse_comm.densify(model)
    with pytest.raises(ValueError, match=r"'0\.weight' is sharded; update its mask before"):
        sparse_comm.update_masks(model, masks)
    with pytest.raises(TypeError, match="Adafactor works on matrices"):
        train(model, torch.optim.Adafactor(model.parameters()), steps=1)


@case(CASES)
def values_changed_works_on_shards(rank: int, world_size: int) -> None:
    x, _ = batch(0)
    for weights in MODES:
        model = shard(sparse_comm.compact(mlp(), random_masks(mlp()), weights=weights))
        before = model(x)
        for p in model.parameters():
            p.to_local().data.mul_(2)
        sparse_comm.values_changed(model)
        after = sparse_comm.dense_state_dict(model)
        expected = mlp()
        expected.load_state_dict(after)
        assert torch.equal(model(x), expected(x))
        assert not torch.equal(model(x), before)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_under_fsdp2(name, world_size):
    passed(__name__, world_size, name)
