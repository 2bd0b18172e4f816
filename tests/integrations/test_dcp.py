"""``torch.distributed.checkpoint``: save on two ranks, load on three, and train on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sparse_comm.integrations.pytorch import fully_shard
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import sparse_comm
from tests.compact.models import mlp, random_masks, same_nnz_masks, same_state, train
from tests.launch import run

WRAPPERS = ("ddp", "fsdp2")
STEPS = 4
FULL = StateDictOptions(full_state_dict=True)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def shard(model: nn.Module) -> nn.Module:
    for module in (*(m for m in model.children() if list(m.parameters())), model):
        fully_shard(module)
    return model


WRAP: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DDP, "fsdp2": shard}


def masks_with_an_empty_one() -> dict[str, Tensor]:
    masks = random_masks(mlp())
    masks["2.weight"].fill_(False)
    return masks


MASKS = {"usual": lambda: random_masks(mlp()), "empty": masks_with_an_empty_one}


def build(wrapper: str, masks: str = "usual") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A wrapped compact model that was trained for no step, and its optimizer."""
    model = sparse_comm.compact(mlp(), MASKS[masks](), weights="transient")
    wrapped = WRAP[wrapper](model)
    return wrapped, adamw(model)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Model and optimizer, whole, and dense weights: as they are now, whatever comes later."""
    found, its = get_state_dict(model, optimizer, options=FULL)
    flat = {f"model.{name}": value for name, value in found.items()}
    for name, state in its["state"].items():
        flat.update({f"optim.{name}.{key}": value for key, value in state.items()})
    dense = sparse_comm.dense_state_dict(model)
    flat.update({f"dense.{name}": value for name, value in dense.items()})
    return copy.deepcopy(flat)


def save(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Train, save model and optimizer as shards, and train on, by wrapper and masks."""
    found = {}
    for wrapper in WRAPPERS:
        for masks in MASKS:
            model, optimizer = build(wrapper, masks)
            how: dict[str, Any] = {"steps": STEPS, "seed": 1000 * (rank + 1)}
            train(model, optimizer, **how)
            state, its = get_state_dict(model, optimizer)
            dcp.save({"model": state, "optim": its}, checkpoint_id=f"{folder}/{wrapper}-{masks}")
            saved = state_of(model, optimizer)
            # all ranks see the same data from here on, so that their number does not matter
            train(model, optimizer, steps=STEPS, first=STEPS)
            found[wrapper, masks] = saved, state_of(model, optimizer)
    return found


def load(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    """Load what each wrapper saved into a model under the same wrapper, and train on."""
    found = {}
    for wrapper in WRAPPERS:
        for masks in MASKS:
            model, optimizer = build(wrapper, masks)
            state, its = get_state_dict(model, optimizer)
            dcp.load({"model": state, "optim": its}, checkpoint_id=f"{folder}/{wrapper}-{masks}")
            set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=its)
            loaded = state_of(model, optimizer)
            train(model, optimizer, steps=STEPS, first=STEPS)
            found[wrapper, masks] = loaded, state_of(model, optimizer)
    return found


def another_pattern(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """What is said where the masks are others of equal nnz, by wrapper."""
    messages = {}
    for wrapper in WRAPPERS:
        other = sparse_comm.compact(mlp(), same_nnz_masks(random_masks(mlp())), weights="transient")
        model = WRAP[wrapper](other)
        state = get_model_state_dict(model)
        dcp.load({"model": state}, checkpoint_id=f"{folder}/{wrapper}-usual")
        with pytest.raises(RuntimeError) as caught:
            set_model_state_dict(model, state)
        messages[wrapper] = str(caught.value)
    return messages


def full_states(rank: int, world_size: int, folder: str) -> tuple[dict[str, Any], ...]:
    """Under FSDP2: whole states out and in again, and the dense weights into files."""
    model, optimizer = build("fsdp2")
    train(model, optimizer, steps=2)
    dense = sparse_comm.dense_state_dict(model)
    dcp.save({"model": dense}, checkpoint_id=f"{folder}/dense")
    whole, moments = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    again, its = build("fsdp2")
    set_state_dict(again, its, model_state_dict=dict(whole), optim_state_dict=moments, options=FULL)
    assert all(isinstance(p, DTensor) for p in again.parameters())
    assert same_state(sparse_comm.dense_state_dict(again), dense)
    other, _ = build("fsdp2")
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(whole) if rank == 0 else {}, options=from_rank_0)
    assert same_state(sparse_comm.dense_state_dict(other), dense)
    assert train(again, its, steps=2) == train(model, optimizer, steps=2)
    return whole, dense


def on_two_ranks(rank: int, world_size: int, folder: str) -> list[Any]:
    return [work(rank, world_size, folder) for work in (save, load, full_states)]


def on_three_ranks(rank: int, world_size: int, folder: str) -> list[Any]:
    return [work(rank, world_size, folder) for work in (load, another_pattern)]


class Results:
    """What each function returned, a value a rank; ``loaded`` by number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.saved, two, self.full = zip(*run(on_two_ranks, 2, self.folder), strict=True)
        three, self.messages = zip(*run(on_three_ranks, 3, self.folder), strict=True)
        self.loaded = {2: two, 3: three}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("masks", MASKS)
def test_training_resumes_on_another_number_of_ranks(results, wrapper, world_size, masks):
    at_save, at_end = results.saved[0][wrapper, masks]
    assert any(name.endswith("exp_avg") for name in at_save)
    for rank in results.loaded[world_size]:
        loaded, trained = rank[wrapper, masks]
        assert same_state(loaded, at_save)
        if world_size == 2:
            assert same_state(trained, at_end)
        for name, value in at_end.items():  # three ranks add in another order
            torch.testing.assert_close(trained[name], value)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_checkpoint_of_another_pattern_is_refused_on_every_rank(results, wrapper):
    """``dcp.load`` writes shards in place; the digests are compared when the state is set."""
    for messages in results.messages:
        assert "0.weight' holds the values of another pattern" in messages[wrapper]


def test_full_state_dicts_under_fsdp2_fit_a_model_of_one_process(results):
    (whole, dense), _ = results.full
    alone = sparse_comm.compact(mlp(), random_masks(mlp()))
    alone.load_state_dict(whole)
    assert same_state(sparse_comm.dense_state_dict(alone), dense)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_dense_export_loads_into_plain_models_and_into_compact_ones(results):
    _, dense = results.full[0]
    plain = mlp()
    state = plain.state_dict()
    dcp.load({"model": state}, checkpoint_id=f"{results.folder}/dense", no_dist=True)
    plain.load_state_dict(state)
    assert same_state(plain.state_dict(), dense)
    compact = sparse_comm.compact(mlp(), random_masks(mlp()))
    compact.load_state_dict(state)
    assert same_state(sparse_comm.dense_state_dict(compact), dense)
