"""Pipelines whose stages are tensor-parallel train what one process trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from axonn import axonn as ax
from axonn.intra_layer import auto_parallelize
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

from tests.compact.models import pruned_are_zero, random_masks, zero_pruned_
from tests.integrations.axonn.models import grid, over_replicas, sgd
from tests.integrations.axonn.test_layers import part
from tests.integrations.cases import Cases, case, passed

CASES: Cases = {}
GRIDS = {
    4: [{"G_inter": 2, "G_intra_r": 2}, {"G_inter": 2, "G_intra_d": 2}],
    6: [{"G_inter": 3, "G_intra_r": 2}],
}
WIDTH = 8


def whole_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for _ in range(6) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)))
    )


class Stage(nn.Module):
    """A part of it, parallel."""

    def __init__(self, number: int, count: int) -> None:
        super().__init__()
        self.first = 12 * number // count
        with auto_parallelize():
            self.layers = whole_model()[self.first : 12 * (number + 1) // count]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def get_input_shape(self) -> list[int]:
        return [-1, WIDTH]

    def get_output_shape(self) -> list[int]:
        return [-1, WIDTH]

    def name(self, name: str) -> str:
        return name.removeprefix("layers.")


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(24, WIDTH, generator=torch.Generator().manual_seed(step)) * 2 - 1
    return x, x.argmax(1)


@case(CASES)
def stages_of_parallel_layers_train_as_one_process(rank: int, world_size: int) -> None:
    masks = random_masks(whole_model(), 0.5)
    plain = whole_model()
    zero_pruned_(plain, masks)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    optimizer = sgd(plain, masks)
    expected = []
    for step in range(5):
        x, y = data(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for sizes in GRIDS[world_size]:
        for weights in ("cached", "transient"):
            with grid(**sizes):
                stage = Stage(ax.config.inter_layer_parallel_rank, ax.config.G_inter)
                stage.load_state_dict({n: state[stage.name(n)] for n in stage.state_dict()})
                options: dict[str, Any] = {"sparse": True, "masks": masks, "weights": weights}
                engine = sparse_axonn.InterLayerEngine(
                    stage, F.cross_entropy, torch.float32, names=stage.name, micro_batch_size=2,
                    bucket_cap_mb=0.0005, **options,
                )  # fmt: skip
                optimizer = sgd(stage)
                losses = []
                for step in range(5):
                    x, y = data(step)
                    axes = ("depth", "row")
                    optimizer.zero_grad()
                    losses.append(
                        engine.forward_backward_optimizer(part(x, *axes), part(y, *axes), optimizer)
                    )
                mean = over_replicas(losses)
                assert mean == pytest.approx(expected, rel=2e-5), (mean, expected)
                assert pruned_are_zero(stage)


@pytest.mark.parametrize("world_size", GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_parallel_stages(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
