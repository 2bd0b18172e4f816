"""AxoNN's strategy for Lightning Fabric trains compact shards as one process trains the whole."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sparse_comm.integrations import axonn as sparse_axonn
from torch import nn

import sparse_comm
from tests.compact.models import pruned_are_zero, random_masks, zero_pruned_
from tests.integrations.axonn.models import sgd
from tests.integrations.axonn.test_launchers import launch, needs_mpi
from tests.integrations.axonn.test_layers import (
    ALL,
    assert_same_weights,
    data,
    mlp,
    part,
)
from tests.integrations.cases import Cases, case, passed

lightning = pytest.importorskip("lightning")

CASES: Cases = {}
GRIDS = ({}, {"G_intra_r": 2}, {"G_intra_c": 2}, {"G_intra_d": 2})


def strategy_of(**options: Any) -> Any:
    from sparse_comm.integrations.axonn.fabric import FabricStrategy

    return FabricStrategy(**options)


@contextlib.contextmanager
def fabric_of(rank: int, world_size: int, strategy: Any) -> Any:
    """As if torchrun had started the ranks."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    fabric = lightning.Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    fabric.launch()
    try:
        yield fabric
    finally:
        sparse_axonn.shutdown()


def made(fabric: Any) -> nn.Module:
    """AxoNN's layers start with other biases than torch's."""
    with fabric.init_module():
        model = mlp()
    model.load_state_dict(mlp().state_dict())
    return model


def expected_of(masks: Any, accumulate: int) -> tuple[nn.Module, list[float]]:
    plain = mlp()
    zero_pruned_(plain, masks)
    optimizer = sgd(plain, masks)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for number in range(accumulate):
            x, y = data(accumulate * step + number)
            loss = F.cross_entropy(plain(x), y) / accumulate
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return plain, losses


def train(fabric: Any, model: Any, optimizer: Any, accumulate: int) -> list[float]:
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for number in range(accumulate):
            x, y = data(accumulate * step + number)
            with fabric.no_backward_sync(model, enabled=number + 1 < accumulate):
                loss = F.cross_entropy(model(part(x, *ALL)), part(y, *ALL)) / accumulate
                fabric.backward(loss, model=model)
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
        optimizer.step()
    return losses


@case(CASES)
def compact_shards_train_as_the_whole(rank: int, world_size: int) -> None:
    masks = random_masks(mlp(), 0.4)
    for sizes in GRIDS:
        for accumulate in (1, 3):
            plain, expected = expected_of(masks, accumulate)
            for weights in ("cached", "transient"):
                options = {"sparse": True, "masks": masks, "weights": weights}
                strategy = strategy_of(**sizes, **options, bucket_cap_mb=0.0005)
                with fabric_of(rank, world_size, strategy) as fabric:
                    model = made(fabric)
                    fabric_model, optimizer = fabric.setup(model, sgd(model))
                    losses = train(fabric, fabric_model, optimizer, accumulate)
                    assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)
                    assert_same_weights(model, plain, 2e-5)
                    assert pruned_are_zero(model)


@case(CASES)
def dense_models_axonns_overlap_and_separate_setup(rank: int, world_size: int) -> None:
    masks = random_masks(mlp(), 0.4)
    for sizes in GRIDS:
        for given in (masks, {}):
            expected = expected_of(given, 1)[1]
            options = {"sparse": True, "masks": masks} if given else {}
            strategy = strategy_of(
                **sizes,
                **options,
                bucket_cap_mb=0.0005,
                overlap_communication="G_intra_d" not in sizes,
            )
            with fabric_of(rank, world_size, strategy) as fabric:
                model = made(fabric)
                fabric_model = fabric.setup_module(model)
                optimizer = fabric.setup_optimizers(sgd(model))
                losses = train(fabric, fabric_model, optimizer, 1)
                assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)
                assert sparse_comm.is_compact(model) == bool(given)


@case(CASES)
def what_cannot_work_is_refused_on_all_ranks(rank: int, world_size: int) -> None:
    masks = random_masks(mlp(), 0.4)
    with pytest.raises(ValueError, match="masks are given, but not sparse=True"):
        strategy_of(masks=masks)
    ahead = strategy_of(G_intra_d=2, overlap_communication=True)
    with pytest.raises(ValueError, match="gathers weights of several depths ahead"):
        fabric_of(rank, world_size, ahead).__enter__()
    with fabric_of(rank, world_size, strategy_of(bucket_cap_mb=0)) as fabric:
        model = made(fabric)
        with pytest.raises(ValueError, match="bucket_cap_mb must be more than 0, got 0"):
            fabric.setup(model, sgd(model))
    with fabric_of(rank, world_size, strategy_of(sparse=True, masks=masks)) as fabric:
        model = made(fabric)
        first, second = (torch.optim.SGD([p], 0.1) for p in list(model.parameters())[:2])
        with pytest.raises(ValueError, match="was given 2 optimizers"):
            fabric.setup(model, first, second)
        with pytest.raises(ValueError, match=r"needs the model that fabric\.setup gave back"):
            fabric.strategy.backward(torch.zeros(1, requires_grad=True).sum(), mlp())


@pytest.mark.parametrize("name", CASES)
def test_fabric(name: str) -> None:
    passed(__name__, 2, name)


@needs_mpi
@pytest.mark.alone
def test_lightning_may_ask_mpi_for_its_ranks(tmp_path):
    printed, code = launch("mpirun", 2, tmp_path, program=__name__)
    assert code == 0, printed
    assert printed.count("compact on 2 ranks") == 2


def main() -> None:
    masks = random_masks(mlp(), 0.4)
    strategy = strategy_of(G_intra_r=2, sparse=True, masks=masks)
    fabric = lightning.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = made(fabric)
    fabric_model, optimizer = fabric.setup(model, sgd(model))
    train(fabric, fabric_model, optimizer, 1)
    assert pruned_are_zero(model)
    print(f"compact on {fabric.world_size} ranks", flush=True)


if __name__ == "__main__":
    main()
