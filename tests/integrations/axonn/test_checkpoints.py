"""What one grid of ranks saved, another resumes, by the names of the whole model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from axonn.intra_layer import auto_parallelize
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import Masks, random_masks, same_nnz_masks
from tests.integrations.axonn import test_tied as tied
from tests.integrations.axonn.models import (
    Stage,
    adamw,
    grid,
    masks_of_whole,
    over_replicas,
    whole_model,
)
from tests.integrations.cases import Cases, case, passed
from tests.launch import shared_folder

CASES: Cases = {}
GLOBAL_BATCH = 16


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, 19, (GLOBAL_BATCH, 5), generator=generator)
    return x, x.amax(1) % 7


def engine_of(masks: Masks | None, **options: Any) -> sparse_axonn.InterLayerEngine:
    torch.manual_seed(dist.get_rank())  # what a checkpoint does not bring differs
    whole = whole_model()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn(parameter.shape) * options.pop("noise", 0.0))
    stage = Stage(whole, ax.config.inter_layer_parallel_rank, ax.config.G_inter)
    if masks is not None:
        options |= {"sparse": True, "masks": masks}
    return sparse_axonn.InterLayerEngine(
        stage, F.cross_entropy, torch.float32, names=stage.name, micro_batch_size=2,
        bucket_cap_mb=0.005, **options,
    )  # fmt: skip


def train(engine: Any, optimizer: Any, first: int, steps: int) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x, y = global_batch(step)
        replica, count = ax.config.data_parallel_rank, ax.config.G_data
        optimizer.zero_grad()
        losses.append(
            engine.forward_backward_optimizer(
                x.chunk(count)[replica], y.chunk(count)[replica], optimizer
            )
        )
    return over_replicas(losses)


@case(CASES)
def a_2_by_2_grid_is_resumed_by_1_by_4_and_4_by_1(rank: int, world_size: int) -> None:
    folder, masks = shared_folder(), masks_of_whole()
    with grid(2, 2):
        engine = engine_of(masks)
        optimizer = adamw(engine.model)
        train(engine, optimizer, 0, 3)
        optimizer.param_groups[0]["lr"] = 3e-3
        with warnings.catch_warnings():  # the second replaces the first, as it is meant
            warnings.filterwarnings("error", "Detected an existing checkpoint")
            for step in (2, 3):
                engine.save_checkpoint(folder, optimizer, extra={"step": step})
        expected = train(engine, optimizer, 3, 4)
    for sizes in ((1, 4), (4, 1), (2, 2)):
        for weights in ("cached", "transient"):
            with grid(*sizes):
                given = sparse_comm.load_masks(folder / "masks.safetensors")
                assert given.keys() == masks.keys()
                engine = engine_of(given, weights=weights, noise=0.1)
                optimizer = adamw(engine.model)
                assert engine.load_checkpoint(folder, optimizer) == {"step": 3}
                assert optimizer.param_groups[0]["lr"] == 3e-3
                assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
                losses = train(engine, optimizer, 3, 4)
                if sizes == (2, 2):
                    assert losses == expected
                else:
                    assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)


@case(CASES)
def weights_and_moments_are_the_same_bits_after_a_round_trip(rank: int, world_size: int) -> None:
    folder, other, masks = shared_folder(), shared_folder(), masks_of_whole()
    with grid(2, 2):
        engine = engine_of(masks)
        optimizer = adamw(engine.model)
        train(engine, optimizer, 0, 3)
        engine.save_checkpoint(folder, optimizer)
        before = everything(engine, optimizer)
    with grid(4, 1):
        engine = engine_of(masks, noise=0.1)
        optimizer = adamw(engine.model)
        engine.load_checkpoint(folder, optimizer)
        engine.save_checkpoint(other, optimizer)
    with grid(2, 2):
        engine = engine_of(masks, noise=0.1)
        optimizer = adamw(engine.model)
        engine.load_checkpoint(other, optimizer)
        after = everything(engine, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def everything(engine: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in optimizer.state[parameter].items():
            found[f"{name} {key}"] = torch.as_tensor(value).clone()
    return found


@case(CASES)
def dense_checkpoints_load_into_compact_stages_and_back(rank: int, world_size: int) -> None:
    folder, other, masks = shared_folder(), shared_folder(), masks_of_whole()
    with grid(2, 2):
        dense = engine_of(None)
        optimizer = adamw(dense.model)
        train(dense, optimizer, 0, 2)
        dense.save_checkpoint(folder, optimizer)
        assert not sparse_comm.load_masks(folder / "masks.safetensors")
    with grid(1, 4):
        engine = engine_of(masks, noise=0.1)
        own = adamw(engine.model)
        engine.load_checkpoint(folder, own)
        engine.save_checkpoint(other, own)
    with grid(2, 2):
        again = engine_of(None, noise=0.1)
        own = adamw(again.model)
        again.load_checkpoint(other, own)
        for (name, a), b in zip(
            dense.model.named_parameters(), again.model.parameters(), strict=True
        ):
            mask = masks.get(again.names[name], torch.ones_like(a, dtype=torch.bool))
            assert torch.equal(a * mask, b)
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[a][key] * mask, own.state[b][key])
            assert own.state[b]["step"] == 2


def sharded() -> nn.Module:
    torch.manual_seed(0)
    with auto_parallelize():
        front = (nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16))
        return nn.Sequential(*front, nn.Linear(16, 4))


@case(CASES)
def shards_are_put_together_and_cut_anew(rank: int, world_size: int) -> None:
    folder = shared_folder()
    masks = random_masks(
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    )

    def steps(engine: Any, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
        losses = []
        for step in range(first, first + 3):
            x = torch.rand(16, 8, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            mine = (x.chunk(4)[rank], x[:, :4].argmax(1).chunk(4)[rank])
            losses.append(engine.forward_backward_optimizer(*mine, optimizer))
        total = torch.tensor(losses, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / 4).tolist()

    def made(factor: float) -> tuple[Any, torch.optim.Optimizer]:
        model = sharded()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        engine = sparse_axonn.InterLayerEngine(
            model, F.cross_entropy, torch.float32, sparse=True, masks=masks, micro_batch_size=2
        )
        return engine, adamw(model)

    with grid(G_intra_r=2, G_intra_d=2):
        engine, optimizer = made(1.0)
        steps(engine, optimizer, 0)
        engine.save_checkpoint(folder, optimizer)
        expected = steps(engine, optimizer, 3)
    for sizes in ({"G_data": 4}, {"G_intra_c": 2, "G_data": 2}, {"G_intra_r": 2, "G_intra_d": 2}):
        with grid(**sizes):
            engine, optimizer = made(1.1)
            engine.load_checkpoint(folder, optimizer)
            losses = steps(engine, optimizer, 3)
            assert losses == pytest.approx(expected, rel=1e-5), (losses, expected)


@case(CASES)
def what_is_split_by_hand_is_refused_and_the_earlier_checkpoint_kept(
    rank: int, world_size: int
) -> None:
    folder = shared_folder()
    with grid(G_intra_r=2, G_data=2):
        model = sharded()
        engine = sparse_axonn.InterLayerEngine(model, F.cross_entropy, micro_batch_size=2)
        optimizer = adamw(model)
        engine.save_checkpoint(folder, optimizer, extra=1)
        with pytest.raises((TypeError, RuntimeError), match="not JSON serializable"):
            engine.save_checkpoint(folder, optimizer, extra=torch.zeros(1))
        assert engine.load_checkpoint(folder, optimizer) == 1
        with torch.no_grad():
            model[2].weight.add_(ax.config.intra_layer_row_parallel_rank)
        with pytest.raises(ValueError, match=r"hold different values of '2\.weight'"):
            engine.save_checkpoint(folder, optimizer)


@case(CASES)
def a_tied_pair_is_resumed_from_one_parameter_and_by_one(rank: int, world_size: int) -> None:
    masks = random_masks(tied.Whole())
    folders = [shared_folder(), shared_folder()]
    weights = []
    for at, sizes in enumerate(((1, 4), (2, 2), (1, 4))):
        with grid(*sizes):
            engine = tied.engine_of(masks, 4)
            optimizer = adamw(engine.model)
            if at:
                engine.load_checkpoint(folders[at - 1], optimizer)
            else:
                tied.train(engine)
            if at < 2:
                engine.save_checkpoint(folders[at], optimizer)
            own = dict(engine.model.named_parameters())
            weights.append(own.get("wte.weight", own.get("head.weight")).detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@case(CASES)
def what_does_not_fit_is_refused_on_all_ranks_and_loads_nothing(rank: int, world_size: int) -> None:
    folder, masks = shared_folder(), masks_of_whole()
    with grid(2, 2):
        engine = engine_of(masks)
        optimizer = adamw(engine.model)
        with pytest.raises((FileNotFoundError, RuntimeError), match="no checkpoint of an Inter"):
            engine.load_checkpoint(folder, optimizer)
        engine.save_checkpoint(folder, optimizer)
        other = engine_of(same_nnz_masks(masks), noise=0.1)
        before = [p.detach().clone() for p in other.model.parameters()]
        with pytest.raises((ValueError, RuntimeError), match="masks of the checkpoint and of the"):
            other.load_checkpoint(folder, adamw(other.model))
        for a, b in zip(before, other.model.parameters(), strict=True):
            assert torch.equal(a, b)
        renamed = engine_of(None)
        renamed.names = {name: f"x.{there}" for name, there in renamed.names.items()}
        with pytest.raises((ValueError, RuntimeError), match=r"has no 'x\."):
            renamed.load_checkpoint(folder, adamw(renamed.model))
        renamed.names = {name: name for name in renamed.names}
        with pytest.raises((ValueError, RuntimeError), match="two stages have a param"):
            renamed.save_checkpoint(folder, adamw(renamed.model))


@pytest.mark.parametrize("name", CASES)
def test_checkpoints(name: str) -> None:
    passed(__name__, 4, name)
