"""``densify`` is the way back, at any moment of a training; and what models say of themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_comm
from tests.compact.models import (
    ConvNet,
    Tied,
    Twice,
    batch,
    everything,
    mlp,
    pair,
    pruned_are_zero,
    random_masks,
    same_optimizer_state,
    same_state,
    same_weights,
    seeded,
    train,
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv net": lambda: seeded(ConvNet),
    "tied": lambda: seeded(Tied),
    "twice": lambda: seeded(Twice),
}
both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])
all_models = pytest.mark.parametrize("model", MODELS)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2)


@both_modes
@all_models
def test_densify_gives_ordinary_parameters_of_the_same_bits(model, weights):
    dense, compact, masks = pair(MODELS[model], weights=weights)
    original = MODELS[model]()
    optimizers = adamw(dense), adamw(compact)
    assert train(dense, optimizers[0], masks, 3) == train(compact, optimizers[1], None, 3)
    gradients = {n: compact.get_parameter(n).grad for n, _ in compact.named_parameters()}
    assert sparse_comm.densify(compact) is compact
    assert [type(m) for m in compact.modules()] == [type(m) for m in original.modules()]
    assert [list(m.__dict__) for m in compact.modules()] == [
        list(m.__dict__) for m in original.modules()
    ]
    assert same_state(compact.state_dict(), dense.state_dict())
    for name, parameter in compact.named_parameters():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter.grad, gradients[name])
    assert not sparse_comm.is_compact(compact)


def test_densify_leaves_a_plain_model_as_it_was():
    model = mlp()
    before = everything(model)
    sparse_comm.densify(model)
    assert everything(model) == before


def test_densify_of_a_layer_leaves_the_others_compact():
    dense, compact, masks = pair()
    sparse_comm.densify(compact[2])
    assert list(sparse_comm.masks_of(compact)) == ["0.weight", "4.weight"]
    assert same_weights(dense, compact)
    compact.load_state_dict(dense.state_dict())
    with pytest.raises(ValueError, match="compact already"):
        sparse_comm.compact(compact, {"2.weight": masks["2.weight"]})
    sparse_comm.compact(compact[2], {"weight": masks["2.weight"]})
    assert same_weights(dense, compact)


@both_modes
@all_models
def test_a_training_that_changes_its_layout_midway_goes_on_as_if_it_had_not(model, weights):
    """compact → dense → compact → dense, optimizer and all: losses of masked dense training."""
    dense, changing, masks = pair(MODELS[model], weights=weights)
    optimizers = adamw(dense), adamw(changing)
    other = {"cached": "transient", "transient": "cached"}[weights]
    for phase in range(4):
        is_compact = phase % 2 == 0
        assert sparse_comm.is_compact(changing) == is_compact
        how: dict[str, Any] = {"steps": 5, "first": 5 * phase}
        expected = train(dense, optimizers[0], masks, **how)
        assert train(changing, optimizers[1], None if is_compact else masks, **how) == expected
        assert same_weights(dense, changing)
        if is_compact:
            assert same_optimizer_state((dense, optimizers[0]), (changing, optimizers[1]))
            sparse_comm.densify(changing, optimizer=optimizers[1])
        else:
            sparse_comm.compact(changing, masks, weights=other, optimizer=optimizers[1])


@both_modes
def test_gradients_that_wait_for_a_step_are_carried_over(weights):
    dense, changing, masks = pair(weights=weights)
    optimizers = adamw(dense), adamw(changing)
    x, y = batch(0)
    for model in (dense, changing):
        F.cross_entropy(model(x), y).backward()
    sparse_comm.densify(changing, optimizer=optimizers[1])
    sparse_comm.compact(changing, masks, optimizer=optimizers[1])
    for optimizer in optimizers:
        optimizer.step()
    state = {n: p * masks.get(n, 1) for n, p in dense.state_dict().items()}
    assert same_state(sparse_comm.dense_state_dict(changing), state)


def test_attributes_of_parameters_are_carried_over():
    """Megatron and DeepSpeed note on parameters how to reduce them."""
    model = mlp()
    model[0].weight.allreduce = False
    masks = random_masks(model)
    sparse_comm.compact(model, masks)
    assert dict(model.named_parameters())["0.weight"].allreduce is False
    sparse_comm.update_masks(model, {"0.weight": ~masks["0.weight"]})
    assert dict(model.named_parameters())["0.weight"].allreduce is False
    sparse_comm.densify(model)
    assert model[0].weight.allreduce is False


# ---------------------------------------------------------------- what a model says of itself


def test_is_compact_tells_compact_models_from_plain_ones():
    model = mlp()
    assert not sparse_comm.is_compact(model)
    sparse_comm.compact(model, {})
    assert not sparse_comm.is_compact(model)
    assert list(model.state_dict()) == list(mlp().state_dict())
    sparse_comm.compact(model, random_masks(model))
    assert sparse_comm.is_compact(model)
    assert sparse_comm.is_compact(nn.ModuleList([mlp(), model]))
    assert not sparse_comm.is_compact(sparse_comm.densify(model))


@all_models
def test_masks_of_gives_the_masks_back_tied_ones_once(model):
    made = MODELS[model]()
    masks = random_masks(made)
    sparse_comm.compact(made, masks)
    found = sparse_comm.masks_of(made)
    assert list(found) == [n for n, _ in made.named_parameters() if n in masks]
    assert all(torch.equal(found[n], masks[n]) for n in masks)


def test_masks_may_be_patterns_and_name_tied_parameters_by_any_name():
    model = seeded(Tied)
    mask = torch.rand(17, 33) < 0.5
    sparse_comm.compact(model, {"out.weight": sparse_comm.SparsityPattern(mask)})
    assert torch.equal(sparse_comm.masks_of(model)["embed.weight"], mask)
    names = [name for name, _ in model.named_parameters()]
    assert names == [name for name, _ in seeded(Tied).named_parameters()]
    assert dict(model.named_parameters())["embed.weight"].shape == (int(mask.sum()),)


@both_modes
def test_a_write_that_torch_cannot_see_counts_after_values_changed(weights):
    _, compact, _ = pair(weights=weights)
    x, _ = batch(0)
    compact(x)
    twin = copy.deepcopy(compact)
    for values in compact.parameters():
        values.data.mul_(2)
    with torch.no_grad():
        for values in twin.parameters():
            values.mul_(2)
    sparse_comm.values_changed(compact)
    assert torch.equal(compact(x), twin(x))
    assert pruned_are_zero(compact)


@pytest.mark.parametrize("layout", ["plain", "compact"])
def test_param_groups_decay_matrices_and_nothing_else(layout):
    model = seeded(ConvNet)
    model.head.weight.requires_grad_(False)
    masks = random_masks(model)
    masks["features.1.weight"] = torch.arange(9) < 5  # a vector stays one when it is compact
    if layout == "compact":
        sparse_comm.compact(model, masks)
    decay, rest = sparse_comm.param_groups(model, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert [names[id(p)] for p in decay["params"]] == ["features.0.weight", "features.3.weight"]
    assert [names[id(p)] for p in rest["params"]] == [
        "features.0.bias",
        "features.1.weight",
        "features.1.bias",
        "features.3.bias",
        "features.4.weight",
        "features.4.bias",
        "head.bias",
    ]
    torch.optim.AdamW([decay, rest])


def test_param_groups_leave_out_an_empty_group_and_hold_a_tied_parameter_once():
    model = nn.Linear(3, 2, bias=False)
    assert [len(g["params"]) for g in sparse_comm.param_groups(model, 0.1)] == [1]
    tied = sparse_comm.compact(seeded(Tied), random_masks(seeded(Tied)))
    assert [len(g["params"]) for g in sparse_comm.param_groups(tied, 0.1)] == [2, 1]
