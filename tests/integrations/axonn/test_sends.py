"""Engines that send what is read train what engines with plain sends train, bit for bit.

Over torch.distributed; test_launchers.py has MPI.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("axonn")

import torch
from axonn import axonn as ax
from torch import Tensor, nn

import sparse_comm
from tests.integrations.axonn.models import (
    ReluStage,
    adamw,
    grid,
    over_replicas,
    relu_batch,
    relu_engine,
    same_stages,
    train_relu,
)
from tests.integrations.cases import Cases, case, on_two, passed

TIMEOUT = 200
CASES: Cases = {}
CODECS = ["auto", "channels", "zeros"]
GRIDS = {2: (2, 1), 3: (3, 1), 4: (2, 2)}  # (G_inter, G_data) by world size


def same_training(world_size: int, steps: int = 8, **options: Any) -> None:
    with grid(*GRIDS[world_size]):
        plain = relu_engine("dense", **options)
        losses = train_relu(plain, steps)
        for codec in CODECS:
            packed = relu_engine(codec, **options)
            assert train_relu(packed, steps) == losses, codec
            assert same_stages(plain.model, packed.model), codec


@case(CASES)
def fifty_steps_in_every_codec(rank: int, world_size: int) -> None:
    same_training(world_size, steps=50)


@case(CASES)
@on_two
def half_precision(rank: int, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        same_training(world_size, computation_dtype=dtype)


@case(CASES)
@on_two
def dense_stages(rank: int, world_size: int) -> None:
    same_training(world_size, compact=False)


@case(CASES)
@on_two
def transient_weights_and_checksums(rank: int, world_size: int) -> None:
    same_training(world_size, weights="transient", pipeline_checksum=True)


@case(CASES)
def evaluation_between_steps(rank: int, world_size: int) -> None:
    with grid(*GRIDS[world_size]):
        found = []
        for codec in ("dense", "zeros"):
            engine = relu_engine(codec)
            losses = train_relu(engine, 2)
            x, y = relu_batch(77)
            x, y = x.repeat(5, 1), y.repeat(5)  # more micro-batches than in training
            losses += over_replicas(
                [engine.forward_backward_optimizer(x, y, eval_mode=True) for _ in range(2)]
            )
            found.append(losses + train_relu(engine, 2, first=2))
        assert found[0] == found[1]


@case(CASES)
@on_two
def fewer_bytes_are_sent(rank: int, world_size: int) -> None:
    """The channels and the zeros, in both directions."""
    with grid(*GRIDS[world_size]):
        fractions = {}
        for codec in ("zeros", "auto"):
            engine = relu_engine(codec, computation_dtype=torch.float32)
            train_relu(engine, 1)
            ends = engine._sends.ends
            for boundary in (ends.before, ends.behind):
                if boundary is not None:
                    sent, received = boundary.take_traffic()
                    assert sent.messages == received.messages == 4
                    fractions[codec] = sent.dense
        assert fractions["auto"] < 0.85 * fractions["zeros"]


@case(CASES)
@on_two
def shapes_may_change(rank: int, world_size: int) -> None:
    """From batch to batch, where AxoNN's own messages are of one shape."""

    def loss_of(out: Tensor, labels: Tensor) -> Tensor:
        return (out.sum((1, 2)) - labels).square().mean()

    whole = nn.Sequential(ReluStage(0, 2), ReluStage(1, 2))
    of_whole = adamw(whole)
    with grid(*GRIDS[world_size]):
        engine = relu_engine("zeros", compact=False, loss=loss_of)
        optimizer = adamw(engine.model)
        for length in (3, 1, 5, 2):
            x = torch.randn(8, length, 66, generator=torch.Generator().manual_seed(length))
            labels = torch.arange(8.0)
            optimizer.zero_grad()
            losses = over_replicas([engine.forward_backward_optimizer(x, labels, optimizer)])
            of_whole.zero_grad()
            total = 0.0
            for part, of_part in zip(x.split(2), labels.split(2), strict=True):
                loss = loss_of(whole(part), of_part)
                (loss / 4).backward()
                total += loss.item()
            of_whole.step()
            assert losses == [total / 4]


@case(CASES)
def a_changed_mask_is_noticed_and_planned_anew(rank: int, world_size: int) -> None:
    with grid(*GRIDS[world_size]):
        found = []
        for codec in ("dense", "auto", "channels"):
            engine = relu_engine(codec)
            optimizer = adamw(engine.model)
            losses = train_relu(engine, 3)
            masks = sparse_comm.masks_of(engine.model)
            grown = {name: torch.ones_like(mask) for name, mask in masks.items()}
            sparse_comm.update_masks(engine.model, grown, optimizer=optimizer)
            x, y = relu_batch(3)
            if codec != "dense":
                with pytest.raises(RuntimeError, match="changed since its sends were planned"):
                    engine.forward_backward_optimizer(x, y, optimizer)
            engine.pack_sends()
            found.append(losses + train_relu(engine, 3, first=3))
        assert found[0] == found[1] == found[2]


@case(CASES)
def bad_input_is_refused_on_all_ranks(rank: int, world_size: int) -> None:
    with grid(*GRIDS[world_size]):
        with pytest.raises(ValueError, match="one of 'auto', 'channels', 'dense', 'zeros', got "):
            relu_engine("lz4")
        first = ax.config.inter_layer_parallel_rank == 0
        with pytest.raises(ValueError, match="the boundary between stages 0 and 1: stage 0 has"):
            relu_engine("zeros" if first else "dense")
        if world_size == 4:
            replica = ax.config.data_parallel_rank
            with pytest.raises(ValueError, match="replicas of stage 0 have different masks next"):
                relu_engine("auto" if replica else "zeros")


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_pipelines(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
