"""Dense weights are those of the values after every way in which DeepSpeed writes values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import nn

import sparse_comm
from sparse_comm.compact.module import compact_slots
from tests.integrations.cases import Case, Cases, case, passed
from tests.launch import shared_folder

from .training import (
    BASE,
    Config,
    batch,
    block,
    dense_weights,
    engine_of,
    loss_of,
    merged,
    pruned,
    start,
    train,
    zero,
)

CASES: Cases = {}
BF16 = {"bf16": {"enabled": True}}


def each(
    *stages: int, **extra: Any
) -> Callable[[Callable[[Config], None]], Callable[[Config], None]]:
    """Register a case for each of these stages, in fp32 and bf16."""

    def register(function: Callable[[Config], None]) -> Callable[[Config], None]:
        for stage in stages:
            for name, precision in (("fp32", {}), ("bf16", BF16)):
                config = merged(BASE, zero(stage), precision, extra)
                title = f"{function.__name__.replace('_', ' ')}, ZeRO {stage} {name}"
                CASES[title] = _with(function, config)
        return function

    return register


def _with(function: Callable[[Config], None], config: Config) -> Case:
    return lambda rank, world_size: function(merged(config))


def assert_fresh(engine: Any) -> None:
    """The module's weight is what its values stand for."""
    for _, module, name, slot in compact_slots(engine.module):
        values = module._parameters[name]
        with deepspeed.zero.GatheredParameters([values], enabled=hasattr(values, "ds_id")):
            expected = slot.expand(values.detach())
            assert torch.equal(torch.clone(getattr(module, name).detach()), expected)


def changed(engine: Any, before: dict[str, torch.Tensor]) -> bool:
    after = dense_weights(engine)
    return not all(torch.equal(after[name], before[name]) for name in before)


def use(engine: Any) -> None:
    """Fill the caches."""
    with torch.no_grad():
        loss_of(engine, 99)


@each(0, 1, 2, 3)
def after_the_start(config: Config) -> None:
    """Which broadcasts rank 0's weights."""
    model, masks = pruned()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 + torch.distributed.get_rank())
    compact = sparse_comm.compact(model, masks)
    with torch.no_grad():
        compact(batch(0)[0])  # the caches are of this rank's own weights
    engine = deepspeed.initialize(
        model=compact, config=config, model_parameters=compact.parameters()
    )[0]
    from sparse_comm.integrations.deepspeed import watch

    watch(engine)
    assert_fresh(engine)
    expected, _ = pruned()
    same = expected[0].weight.detach().to(torch.bfloat16 if "bf16" in config else torch.float32)
    assert torch.equal(dense_weights(engine)["0.weight"], same)


@each(0, 1, 2, 3)
def after_a_step(config: Config) -> None:
    engine = engine_of(config, "cached")
    for seed in range(3):
        before = dense_weights(engine)
        engine.backward(loss_of(engine, seed))
        engine.step()
        assert changed(engine, before)
        assert_fresh(engine)


@each(0, 1, 2, 3)
def after_a_step_of_an_engine_that_is_not_watched(config: Config) -> None:
    """Whose masters are copies that no hook can tell from another model's parameters."""
    model, masks = pruned()
    compact = sparse_comm.compact(model, masks)
    engine = deepspeed.initialize(
        model=compact, config=config, model_parameters=compact.parameters()
    )[0]
    assert train(engine) == train(engine_of(config, "transient"))
    assert_fresh(engine)


@each(0, 1, 2, 3, gradient_accumulation_steps=2)
def only_at_the_boundary_of_an_accumulation(config: Config) -> None:
    engine = engine_of(config, "cached")
    for seed in range(4):
        before = dense_weights(engine)
        engine.backward(loss_of(engine, seed))
        engine.step()
        assert changed(engine, before) == (seed % 2 == 1)
        assert_fresh(engine)


@each(1, 2, 3)
def after_a_step_that_overflowed(config: Config) -> None:
    if "bf16" not in config:
        return
    engine = engine_of(merged(config, {"bf16": {"check_grad_overflow": True}}), "cached")
    train(engine, 1)
    before = dense_weights(engine)
    engine.backward(loss_of(engine, 1) * float("inf"))
    engine.step()
    assert not engine.was_step_applied()
    assert engine.skipped_steps == 1
    assert not changed(engine, before)
    assert_fresh(engine)
    train(engine, 1)
    assert changed(engine, before)
    assert_fresh(engine)


@each(0, 1, 2, 3)
def after_a_checkpoint(config: Config) -> None:
    engine = engine_of(config, "cached")
    folder = str(shared_folder())
    engine.save_checkpoint(folder)
    before = dense_weights(engine)
    train(engine, 2)
    other = engine_of(config, "cached")
    train(other, 1)
    use(other)
    other.load_checkpoint(folder)
    assert not changed(other, before)
    assert_fresh(other)


@each(1, 2)
def after_writes_to_masters(config: Config) -> None:
    """DeepSpeed's ``safe_set_full_fp32_param``, which takes effect with the next step.

    In ZeRO 3 it fails on parameters whose size the number of ranks does not divide.
    """
    engine = engine_of(config, "cached")
    train(engine, 1)
    values = engine.module[0]._parameters["weight"]
    masters = safe_get_full_fp32_param(values)
    safe_set_full_fp32_param(values, masters * 2)
    use(engine)
    train(engine, 1)
    assert_fresh(engine)


@each(3)
def after_gathered_writes(config: Config) -> None:
    """To values, and to the dense weight."""
    for weights in ("cached", "transient"):
        engine = engine_of(config, weights)
        use(engine)
        layer: nn.Module = engine.module[0]
        mask = sparse_comm.masks_of(engine.module)["0.weight"]
        with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0):
            layer._parameters["weight"].data.fill_(3.0)
        assert_fresh(engine)
        assert torch.equal(dense_weights(engine)["0.weight"], (3.0 * mask).to(layer.weight.dtype))
        with deepspeed.zero.GatheredParameters(layer.weight, modifier_rank=0):
            layer.weight.data.fill_(5.0)
        assert_fresh(engine)
        assert torch.equal(dense_weights(engine)["0.weight"], (5.0 * mask).to(layer.weight.dtype))


@each(0, 1, 2)
def after_writes_through_data_that_are_told(config: Config) -> None:
    engine = engine_of(config, "cached")
    use(engine)
    engine.module[0]._parameters["weight"].data.fill_(3.0)
    sparse_comm.values_changed(engine.module)
    assert_fresh(engine)


@case(CASES)
def no_cache_is_kept_of_partitioned_values(rank: int, world_size: int) -> None:
    config = merged(BASE, zero(3))
    with pytest.warns(UserWarning, match="unsharded: 0 MB in 16 bits"):
        engine = engine_of(config, "cached")
    train(engine, 1)
    engine.module.to("cpu")
    assert all(slot.cache is None for _, _, _, slot in compact_slots(engine.module))


@case(CASES)
def the_first_step_says_what_it_reduces(rank: int, world_size: int) -> None:
    from sparse_comm.integrations.deepspeed import gradient_bytes

    for stage, size in ((0, 4), (1, 4), (2, 2), (3, 2)):
        extra = BF16 if size == 2 else {}
        model, masks = pruned()
        numel = sum(p.numel() for p in model.parameters())
        unpruned = numel - sum(int((~mask).sum()) for mask in masks.values())
        engine = start(model, merged(BASE, zero(stage), extra, block()))
        assert gradient_bytes(engine) is None
        train(engine, 2)
        assert gradient_bytes(engine) == {"dense": numel * size, "sent": unpruned * size}
        assert not any(p._backward_hooks for p in engine.module.parameters())


@pytest.mark.parametrize("name", CASES)
def test_the_dense_weights_follow(name):
    passed(__name__, 2, name)
