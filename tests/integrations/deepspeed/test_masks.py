"""Masks from every source that the block knows give the same training."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune

import sparse_comm
from tests.integrations.cases import Cases, case, passed
from tests.launch import run, shared_folder

from .training import (
    BASE,
    block,
    merged,
    mlp,
    on_first,
    pruned,
    start,
    train,
    zero,
)

CASES: Cases = {}


class CompressedLinear(nn.Linear):
    """What ``deepspeed.compression`` of DeepSpeed 0.18 makes of a linear layer, as far as it shows.

    (The real one, of 0.18.9, gives the same masks; that release has no place beside this one.)
    """

    sparse_pruning_mask: Tensor | None
    sparse_pruning_method: str | None = None

    def enable_sparse_pruning(self, mask: Tensor) -> None:
        self.sparse_pruning_method = "l1"
        self.register_buffer("sparse_pruning_mask", mask.to(self.weight.dtype))

    def get_mask(self, pruning_type: str) -> Tensor:
        assert pruning_type == "sparse" and self.sparse_pruning_mask is not None
        return self.sparse_pruning_mask

    def fix_sparse_pruning_helper(self) -> None:
        self.weight.data = self.weight.data * self.get_mask("sparse")
        del self.sparse_pruning_mask
        self.sparse_pruning_method = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.sparse_pruning_method is not None:
            weight = weight * self.get_mask("sparse")
        return nn.functional.linear(x, weight, self.bias)


def expected(stage: int) -> list[float]:
    return train(start(pruned()[0], merged(BASE, zero(stage), block())))


def losses(model: nn.Module, stage: int, masks: str) -> list[float]:
    engine = start(model, merged(BASE, zero(stage), block(masks)))
    assert list(sparse_comm.masks_of(engine.module)) == ["0.weight", "2.weight", "4.weight"]
    return train(engine)


@case(CASES)
def from_a_file(rank: int, world_size: int) -> None:
    model, masks = mlp(), pruned()[1]  # weights that are not zero yet become so
    path = shared_folder() / "masks.safetensors"
    on_first(lambda: sparse_comm.save_masks(masks, path))
    for stage in (1, 3):
        assert losses(model if stage == 1 else mlp(), stage, str(path)) == expected(stage)


@case(CASES)
def from_torch_prune(rank: int, world_size: int) -> None:
    for stage in (1, 3):
        model, masks = mlp(), pruned()[1]
        for name, mask in masks.items():
            prune.custom_from_mask(
                model.get_submodule(name.removesuffix(".weight")), "weight", mask
            )
        assert losses(model, stage, "from_torch_prune") == expected(stage)


@case(CASES)
def from_deepspeed_compression(rank: int, world_size: int) -> None:
    for stage in (1, 3):
        model, masks = mlp(), pruned()[1]
        for name, mask in masks.items():
            old: Any = model.get_submodule(name.removesuffix(".weight"))
            new = CompressedLinear(old.in_features, old.out_features)
            new.load_state_dict(old.state_dict())
            new.enable_sparse_pruning(mask)
            setattr(model, name.removesuffix(".weight"), new)
        assert losses(model, stage, "from_deepspeed_compression") == expected(stage)
        assert not any("pruning" in name for name in model.state_dict())


@case(CASES)
def masks_of_what_starts_at_zero_are_made_of_rank_0s_and_of_all(rank: int, world: int) -> None:
    """With other weights on each rank, zeros must agree, and rank 0's values count."""
    model, masks = pruned()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + rank)
    engine = start(model, merged(BASE, zero(1), block()))
    found = sparse_comm.masks_of(engine.module)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert train(engine) == expected(1)


@pytest.mark.parametrize("name", CASES)
def test_masks(name):
    passed(__name__, 2, name)


class ModelParallel:
    """A client's ``mpu``: both ranks hold parts of one model."""

    def __init__(self) -> None:
        self._all = dist.new_group([0, 1])
        self._alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._all

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._alone


def _train_parts(rank: int, world_size: int) -> None:
    """The parts have masks, and weights, of their own."""
    model, masks = pruned()
    with torch.no_grad():
        for name, mask in masks.items():
            masks[name] = mask.roll(rank, 0)
            weight = model.get_parameter(name)
            weight.copy_(weight.roll(rank, 0))
    engine = start(model, merged(BASE, zero(1), block()), mpu=ModelParallel())
    found = sparse_comm.masks_of(engine.module)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    losses = train(engine)
    assert len(set(losses)) == len(losses)
    folder = shared_folder()
    engine.save_checkpoint(str(folder))
    saved = sparse_comm.load_masks(folder / "global_step6" / "masks.safetensors")
    assert len(saved) == 6
    engine.load_checkpoint(str(folder))


def test_model_parallel_ranks_have_masks_of_their_own():
    run(_train_parts, 2)
