"""An embedding on the first stage and the head tied to it on the last train as in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import Masks, pruned_are_zero, random_masks, zero_pruned_
from tests.integrations.axonn.models import TOKENS, WIDTH, Block, grid, over_replicas, sgd
from tests.integrations.cases import Cases, case, passed

CASES: Cases = {}
GRIDS = {2: [(2, 1), (1, 2)], 3: [(3, 1)], 4: [(2, 2)]}
TIED = ("wte.weight", "head.weight")


class Whole(nn.Module):
    """A language model; its own names are those of its stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.wte.weight, std=0.1)
        self.blocks = nn.ModuleDict({str(n): Block() for n in range(3)})
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.wte(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x).transpose(1, 2)


class Part(nn.Module):
    """A stage of it; alone, the last has a head of other weights."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        whole = copy.deepcopy(Whole())
        cuts = {1: [0, 3], 2: [0, 2, 3], 3: [0, 1, 2, 3]}[count]
        if number == 0:
            self.wte = whole.wte
        self.blocks = nn.ModuleDict(
            {str(n): whole.blocks[str(n)] for n in range(cuts[number], cuts[number + 1])}
        )
        if number == count - 1:
            self.head = whole.head
            if count > 1:
                self.head.weight = nn.Parameter(torch.randn(TOKENS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "wte"):
            x = self.wte(x)
        for block in self.blocks.values():
            x = block(x)
        return self.head(x).transpose(1, 2) if hasattr(self, "head") else x

    def get_input_shape(self) -> list[int]:
        return [-1, 5, WIDTH]

    def get_output_shape(self) -> list[int]:
        return [-1, 5, WIDTH]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, TOKENS, (8, 6), generator=generator).cumsum(1) % TOKENS
    return x[:, :-1], x[:, 1:]


def train_whole(model: nn.Module, masks: Masks, micro_batches: int, replicas: int) -> list[float]:
    zero_pruned_(model, masks)
    optimizer = sgd(model, masks)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        total = 0.0
        for replica in range(replicas):
            x, y = batch(1000 * replica + step)
            for a, b in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                loss = F.cross_entropy(model(a), b) / micro_batches / replicas
                loss.backward()
                total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def engine_of(masks: Masks, micro_batches: int, **options: Any) -> sparse_axonn.InterLayerEngine:
    return sparse_axonn.InterLayerEngine(
        Part(ax.config.inter_layer_parallel_rank, ax.config.G_inter),
        F.cross_entropy,
        torch.float32,
        sparse=bool(masks),
        masks=masks or None,
        micro_batch_size=8 // micro_batches,
        bucket_cap_mb=0.005,
        **{"tied": TIED, **options},
    )


def train(engine: sparse_axonn.InterLayerEngine) -> list[float]:
    optimizer = sgd(engine.model)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        x, y = batch(1000 * ax.config.data_parallel_rank + step)
        losses.append(engine.forward_backward_optimizer(x, y, optimizer))
    return over_replicas(losses)


@case(CASES)
def tied_stages_train_as_one_process(rank: int, world_size: int) -> None:
    masks = random_masks(Whole())
    assert "head.weight" not in masks
    for sizes in GRIDS[world_size]:
        for micro_batches in (1, 4):
            for given in (masks, {}):
                with grid(*sizes):
                    whole = Whole()
                    expected = train_whole(whole, given, micro_batches, sizes[1])
                    engine = engine_of(given, micro_batches)
                    losses = train(engine)
                    assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)
                    own = sparse_comm.dense_state_dict(engine.model)
                    for name, tensor in whole.state_dict().items():
                        if name in own:
                            assert torch.allclose(own[name], tensor, atol=1e-5)
                    assert pruned_are_zero(engine.model)


@case(CASES)
def both_ends_keep_the_same_bits(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(*sizes):
            engine = engine_of(random_masks(Whole()), 4, reduce_dtype=torch.bfloat16)
            train(engine)
            own = sparse_comm.dense_state_dict(engine.model)
            mine = own.get("wte.weight", own.get("head.weight"))
            said: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(said, None if mine is None else mine.tolist())
            assert len({str(x) for x in said if x is not None}) == 1


@case(CASES)
def names_that_are_not_there_are_refused_on_all_ranks(rank: int, world_size: int) -> None:
    for masks in ({}, random_masks(Whole())):
        raised = pytest.raises((ValueError, RuntimeError), match=r"has no parameter 'tail")
        with grid(*GRIDS[world_size][0]), raised:
            engine_of(masks, 4, tied=("wte.weight", "tail.weight"))


@case(CASES)
def masks_that_differ_at_the_two_ends_are_refused(rank: int, world_size: int) -> None:
    masks = random_masks(Whole())
    other = masks["wte.weight"].flatten().roll(1).reshape(masks["wte.weight"].shape)
    sizes = GRIDS[world_size][0]
    with grid(*sizes), pytest.raises(ValueError, match=r"are not alike: shape .*masks' digest"):
        engine_of(masks | {"head.weight": other}, 4)


@pytest.mark.parametrize("world_size", GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_tied(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
