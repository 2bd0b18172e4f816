"""Engines of compact stages train what one process trains on the masked dense model.

Over torch.distributed; test_launchers.py has MPI.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from axonn.inter_layer import AxoNN_Inter_Layer_Engine
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.compact.models import pruned_are_zero
from tests.integrations.axonn.models import (
    BATCH,
    adamw,
    batch,
    close_weights,
    dense_engine_of,
    engine_of,
    grid,
    masks_of_whole,
    over_replicas,
    same_stages,
    same_weights,
    sgd,
    this_stage,
    train,
    train_whole,
    whole_model,
)
from tests.integrations.cases import Cases, case, passed

TIMEOUT = 240
CASES: Cases = {}
GRIDS = {2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2)]}  # (G_inter, G_data) by world size
MODES = ("cached", "transient")


@case(CASES)
def a_pipeline_is_one_process_bit_for_bit(rank: int, world_size: int) -> None:
    if world_size == 4:
        return
    masks = masks_of_whole()
    for micro_batches, steps in ((1, 12), (4, 50), (8, 6)):
        whole = whole_model()
        expected = train_whole(whole, masks, micro_batches, steps=steps)
        for weights in MODES:
            with grid(G_inter=world_size):
                engine = engine_of(masks, micro_batches, weights=weights)
                assert train(engine, steps=steps) == expected
                assert same_weights(whole, engine.model)
                assert pruned_are_zero(engine.model)


@case(CASES)
def replicas_are_one_process_within_rounding(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            whole = whole_model()
            expected = train_whole(whole, masks, 2, replicas=sizes[1], make=sgd)
            engine = engine_of(masks, 2)
            losses = train(engine, sgd(engine.model))
            assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)
            assert close_weights(whole, engine.model, 1e-4)
            assert pruned_are_zero(engine.model)


@case(CASES)
def compact_stages_are_masked_dense_stages(rank: int, world_size: int) -> None:
    """Bit for bit, in each precision, but for the order in which three replicas are added."""
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with grid(*sizes):
                dense, optimizer = dense_engine_of(masks, dtype=dtype, reduce_dtype=dtype)
                expected = train(dense, optimizer, steps=10)
                for weights in MODES:
                    engine = engine_of(masks, dtype=dtype, weights=weights)
                    losses = train(engine, steps=10)
                    if sizes[1] < 3:
                        assert losses == expected
                        assert same_stages(engine.model, dense.model)
                    else:
                        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                        assert losses == pytest.approx(expected, rel=tolerance)
                assert expected[-1] < expected[0]


@case(CASES)
def dense_stages_are_axonns_own(rank: int, world_size: int) -> None:
    """Without a pipeline, for which AxoNN needs MPI: test_launchers.py."""
    if world_size == 3:  # AxoNN adds one parameter at a time
        return
    for dtype in (torch.float32, torch.bfloat16):
        with grid(G_data=world_size):
            ours = engine_of(dtype=dtype)
            stage = this_stage()
            theirs = AxoNN_Inter_Layer_Engine(stage, F.cross_entropy, dtype)
            expected = train(theirs, adamw(stage), steps=10)
            losses = train(ours, steps=10)
            if world_size == 2:
                assert losses == expected
                assert same_stages(stage, ours.model)
            else:
                assert losses == pytest.approx(expected, rel=1e-5)


@case(CASES)
def overlap_and_bucket_size_change_nothing(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            engines = [engine_of(masks, overlap=overlap) for overlap in (True, False)]
            losses = [train(engine, steps=10) for engine in engines]
            assert losses[0] == losses[1]
            assert same_stages(engines[0].model, engines[1].model)
            one = engine_of(masks, bucket_cap_mb=100)
            tolerance = {1: 0.0, 2: 0.0, 3: 1e-5}[sizes[1]]
            assert train(one, steps=10) == pytest.approx(losses[0], rel=tolerance, abs=0)


@case(CASES)
def evaluation_gives_the_loss_and_changes_nothing(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        for dtype in (torch.float32, torch.float16):
            for micro_batches in (1, 4):
                with grid(*sizes):
                    engine = engine_of(masks, micro_batches, dtype=dtype)
                    optimizer = adamw(engine.model)
                    train(engine, optimizer, steps=2)
                    before = {n: t.clone() for n, t in engine.model.state_dict().items()}
                    gradients = [p.grad.clone() for p in engine.model.parameters()]
                    scaler = vars(engine.scaler).copy()
                    x, y = batch(5 + 1000 * ax.config.data_parallel_rank)
                    losses = []
                    for given in (optimizer, None):
                        loss = engine.forward_backward_optimizer(x, y, given, eval_mode=True)
                        losses += over_replicas([loss])
                    assert losses[0] == losses[1]
                    after = engine.model.state_dict()
                    assert all(torch.equal(after[name], before[name]) for name in before)
                    for parameter, gradient in zip(
                        engine.model.parameters(), gradients, strict=True
                    ):
                        assert torch.equal(parameter.grad, gradient)
                    assert vars(engine.scaler) == scaler
                    optimizer.zero_grad()
                    trained = engine.forward_backward_optimizer(x, y, optimizer)
                    assert over_replicas([trained])[0] == losses[0]


@case(CASES)
def fp16_overflow_skips_the_step_on_all_ranks(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes), contextlib.redirect_stdout(None):
            engine = engine_of(masks, dtype=torch.float16)
            optimizer = adamw(engine.model)
            engine.scaler.loss_scale = 2.0**24
            before = {n: t.clone() for n, t in engine.model.state_dict().items()}
            train(engine, optimizer, steps=1)
            assert engine.scaler.loss_scale == 2.0**23
            assert all(torch.equal(t, before[n]) for n, t in engine.model.state_dict().items())
            assert not optimizer.state
            train(engine, optimizer, steps=12)
            assert optimizer.state
            assert all(bool(p.isfinite().all()) for p in engine.model.parameters())
            engine.scaler.scaling_window = engine.scaler.no_overflow_iters + 1
            scale = engine.scaler.loss_scale
            train(engine, optimizer, steps=1)
            assert engine.scaler.loss_scale == 2 * scale


class Checkpointed(nn.Module):
    """A layer that computes its activations again in backward."""

    def __init__(self, layer: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.again = functools.partial(checkpoint, layer, use_reentrant=use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x)


@case(CASES)
def checkpointed_stages_train_the_same(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            expected = train(engine_of(masks), steps=6)
            for use_reentrant in (False, True):
                for weights in MODES:
                    stage = this_stage(masks=masks)
                    layers = stage.layers
                    for number in range(len(layers)):
                        if isinstance(layers[number], nn.Embedding):
                            continue  # its inputs have no gradients, of which reentrant ones live
                        layers[number] = Checkpointed(layers[number], use_reentrant)

                    def name(local: str, stage: Any = stage) -> str:
                        return stage.name(local.replace(".layer.", "."))

                    engine = engine_of(masks, stage=stage, names=name, weights=weights)
                    assert train(engine, steps=6) == expected


class UsedTwice(nn.Module):
    """One layer in two reentrant checkpoints: its gradient grows twice in a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(33, 33)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


@case(CASES)
def gradients_that_grow_twice_are_averaged_when_complete(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            losses = []
            for overlap in (True, False):
                for micro_batches in (1, 4):
                    stage = this_stage()
                    torch.manual_seed(3)
                    stage.layers.insert(1, UsedTwice())
                    engine = engine_of(
                        None, micro_batches, stage=stage, names=None, overlap=overlap
                    )
                    losses.append(train(engine, steps=4))
            assert losses[:2] == losses[2:]


class Branches(nn.Module):
    """Uses one of two layers, and never a third."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(33, 33) for _ in range(3))
        self.choice = 0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers[self.choice](x)


@case(CASES)
def what_some_ranks_leave_unused_is_zero_there(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            stage = this_stage()
            torch.manual_seed(3)
            branches = Branches()
            stage.layers.insert(1, branches)
            branches.choice = min(ax.config.data_parallel_rank, 1)
            before = branches.layers[2].weight.clone()
            engine = engine_of(stage=stage, names=None)
            train(engine, steps=3)
            used, other, never = branches.layers
            assert used.weight.grad is not None
            assert (other.weight.grad is None) == (sizes[1] == 1)
            assert never.weight.grad is None
            assert torch.equal(never.weight, before)
            replicas = engine._state.groups[frozenset(("data",))]
            for parameter in branches.parameters():
                assert on_all(parameter.detach(), replicas)


@case(CASES)
def a_gradient_that_grows_too_late_is_an_error(rank: int, world_size: int) -> None:
    if world_size != 2:
        return
    with grid(G_data=2):
        stage = this_stage()
        twice = UsedTwice()
        stage.layers.insert(1, twice)
        engine = engine_of(stage=stage, names=None, bucket_cap_mb=1e-6)
        train(engine, steps=1)
        engine._buckets._expected.subtract({id(twice.layer.weight): 1})
        x, y = batch(0, BATCH // 4)
        with pytest.raises(RuntimeError, match=r"'layers\.1\.layer\.weight' grew after .*overlap"):
            engine.forward_backward_optimizer(x, y, adamw(stage))
        with pytest.raises(RuntimeError, match="an earlier step has failed"):
            engine_of().forward_backward_optimizer(x, y, adamw(stage))


@case(CASES)
def parameters_that_are_frozen_and_unfrozen_are_averaged(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            stage = this_stage()
            first = next(stage.parameters()).requires_grad_(False)
            engine = engine_of(stage=stage)
            before = first.clone()
            train(engine, steps=2)
            assert torch.equal(first, before)
            first.requires_grad_(True)
            train(engine, steps=2)
            assert not torch.equal(first, before)
            replicas = engine._state.groups[frozenset(("data",))]
            assert all(on_all(p.detach(), replicas) for p in stage.parameters())


@case(CASES)
def a_hook_sees_gradients_before_they_are_averaged(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            expected = train(engine_of(masks), steps=6)
            engine = engine_of(masks)
            seen = []

            def hook(model: nn.Module, seen: list[Any] = seen) -> None:
                seen.append(next(model.parameters()).grad.clone())

            assert train(engine, steps=6, post_bw_hook=hook) == expected
            assert len(seen) == 6
            replicas = engine._state.groups[frozenset(("data",))]
            assert on_all(seen[-1], replicas) == (sizes[1] == 1)
            assert on_all(next(engine.model.parameters()).grad, replicas)


@case(CASES)
def masks_may_go_by_the_names_of_the_stage(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            expected = train(engine_of(masks), steps=4)
            stage = this_stage(masks=masks)
            whole = {n: stage.name(n) for n in stage.state_dict()}
            by_mapping = engine_of(masks, stage=stage, names=whole)
            assert train(by_mapping, steps=4) == expected
            stage = this_stage(masks=masks)
            mine = {n: masks[w] for n, w in whole.items() if w in masks}
            assert train(engine_of(mine, stage=stage, names=None), steps=4) == expected


@case(CASES)
def an_optimizer_built_before_is_carried_over(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    with grid(*GRIDS[world_size][0]):
        expected = train(engine_of(masks), steps=4)
        stage = this_stage(masks=masks)
        optimizer = adamw(stage)
        engine = engine_of(masks, stage=stage, optimizer=optimizer)
        assert train(engine, optimizer, steps=4) == expected


@case(CASES)
def figures_say_what_was_sent(rank: int, world_size: int) -> None:
    masks = masks_of_whole()
    with (
        grid(*GRIDS[world_size][0]),
        pytest.raises(RuntimeError, match=r"InterLayerEngine\(…, stats=True\)"),
    ):
        engine_of().stats()
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            for overlap in (True, False):
                engine = engine_of(masks, dtype=torch.bfloat16, stats=True, overlap=overlap)
                train(engine, steps=4)
                stats = engine.stats()
                parameters = list(engine.model.parameters())
                dense = sum(p.numel() for p in this_stage().parameters())
                assert stats["steps"] == 4
                assert stats["bytes_dense"] == 4 * dense
                # a number more a parameter says that it has a gradient
                sent = 2 * sum(p.numel() + 1 for p in parameters) if sizes[1] > 1 else 0
                assert stats["bytes_sent"] == sent
                assert 0 <= stats["exposed_s"] < 10
                assert (stats["collectives"] > 1) == (sizes[1] > 1)


@case(CASES)
def a_profile_shows_the_phases(rank: int, world_size: int) -> None:
    with grid(*GRIDS[world_size][0]):
        engine = engine_of(masks_of_whole())
        train(engine, steps=1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(engine, steps=1)
        names = {event.name for event in profile.events()}
        phases = {"forward", "backward", "collective", "send", "wait"}
        if ax.config.inter_layer_parallel_rank == ax.config.G_inter - 1:
            phases.add("loss")
        assert {f"sparse_comm::axonn.{phase}" for phase in phases} <= names


def on_all(tensor: Tensor, group: Any) -> bool:
    """Whether all ranks of the group have the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return all(torch.equal(part, tensor) for part in parts)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_engines(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
