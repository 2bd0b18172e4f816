"""``update_masks``: what stays unpruned keeps value and state, what grows starts at zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_comm
from tests.compact.models import (
    ConvNet,
    Masks,
    Tied,
    Twice,
    batch,
    mlp,
    pair,
    pruned_are_zero,
    random_masks,
    same_nnz_masks,
    same_optimizer_state,
    same_state,
    same_weights,
    seeded,
    train,
    zero_pruned_,
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv net": lambda: seeded(ConvNet),
    "tied": lambda: seeded(Tied),
    "twice": lambda: seeded(Twice),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
}
both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])


def other_masks(model: nn.Module, seed: int) -> Masks:
    return random_masks(model, density=0.5, seed=seed)


def update_dense_(model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks) -> None:
    """What ``update_masks`` does, on a masked dense model: its pruned entries have no state."""
    zero_pruned_(model, masks)
    for name, parameter in model.named_parameters():
        for value in optimizer.state[parameter].values():
            if name in masks and isinstance(value, torch.Tensor) and value.dim():
                value.mul_(masks[name])


@both_modes
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_training_goes_on_as_masked_dense_training_with_other_masks(model, optimizer, weights):
    plain = MODELS[model]()
    dense, compact, masks = pair(MODELS[model], weights=weights)
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (dense, compact)]
    for phase in range(4):
        how: dict[str, Any] = {"steps": 5, "first": 5 * phase}
        expected = train(dense, optimizers[0], masks, **how)
        assert train(compact, optimizers[1], **how) == expected
        assert same_weights(dense, compact)
        assert same_optimizer_state((dense, optimizers[0]), (compact, optimizers[1]))
        assert pruned_are_zero(compact)
        masks = other_masks(plain, seed=10 + phase)
        update_dense_(dense, optimizers[0], masks)
        assert sparse_comm.update_masks(compact, masks, optimizer=optimizers[1]) is compact
        assert same_weights(dense, compact)
        found = sparse_comm.masks_of(compact)
        assert all(torch.equal(found[name], masks[name]) for name in masks)


@both_modes
def test_kept_entries_keep_their_value_and_grown_ones_are_zero(weights):
    model = mlp()
    masks = random_masks(model)
    sparse_comm.compact(model, masks, weights=weights)
    before = model[0].weight.detach().clone()
    new = other_masks(mlp(), seed=7)["0.weight"]
    sparse_comm.update_masks(model, {"0.weight": new})
    after = model[0].weight.detach()
    assert torch.equal(after, before * new)
    assert not after[new & ~masks["0.weight"]].any()
    assert dict(model.named_parameters())["0.weight"].shape == (int(new.sum()),)


def test_parameters_that_are_not_named_stay_the_very_same():
    _, model, masks = pair()
    before = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, steps=1)
    state = optimizer.state[before["4.weight"]]
    sparse_comm.update_masks(model, {"0.weight": ~masks["0.weight"]}, optimizer=optimizer)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert [name for name in after if after[name] is not before[name]] == ["0.weight"]
    assert optimizer.state[after["4.weight"]] is state
    assert before["0.weight"] not in optimizer.state
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [
        p.shape for p in model.parameters()
    ]


def test_a_tied_parameter_is_updated_under_any_of_its_names_and_stays_tied():
    _, model, masks = pair(lambda: seeded(Tied))
    sparse_comm.update_masks(model, {"out.weight": ~masks["embed.weight"]})
    assert torch.equal(sparse_comm.masks_of(model)["embed.weight"], ~masks["embed.weight"])
    assert model.embed._parameters["weight"] is model.out._parameters["weight"]
    assert torch.equal(model.embed.weight, model.out.weight)
    with pytest.raises(ValueError, match=r"tied parameter 'out\.weight' has two different masks"):
        both = {"embed.weight": masks["embed.weight"], "out.weight": ~masks["embed.weight"]}
        sparse_comm.update_masks(model, both)


def test_a_module_at_two_places_is_updated_under_either_name():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Sequential(layer))
    mask = torch.rand(4, 4) < 0.5
    sparse_comm.compact(model, {"0.weight": mask})
    sparse_comm.update_masks(model, {"1.0.weight": ~mask})
    assert torch.equal(sparse_comm.masks_of(model)["0.weight"], ~mask)


@both_modes
def test_gradients_that_wait_for_a_step_are_carried_over(weights):
    _, model, masks = pair(weights=weights)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    new = other_masks(mlp(), seed=7)
    before = {name: model.get_parameter(name).grad.clone() for name in masks}
    sparse_comm.update_masks(model, new)
    for name in masks:
        assert torch.equal(model.get_parameter(name).grad, before[name] * new[name])


@both_modes
def test_all_may_be_pruned_and_grow_again(weights):
    _, model, masks = pair(weights=weights)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    train(model, optimizer, steps=2)
    none = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    sparse_comm.update_masks(model, none, optimizer=optimizer)
    assert not any(model.get_parameter(name).any() for name in masks)
    train(model, optimizer, steps=2)
    everything = {name: torch.ones_like(mask) for name, mask in masks.items()}
    sparse_comm.update_masks(model, everything, optimizer=optimizer)
    train(model, optimizer, steps=2)
    assert model[4].weight.count_nonzero() == model[4].weight.numel()


def test_the_new_digest_counts_from_then_on():
    _, model, masks = pair()
    old = model.state_dict()
    sparse_comm.update_masks(model, same_nnz_masks(masks))
    with pytest.raises(RuntimeError, match=r"'0\.weight' holds the values of another pattern"):
        model.load_state_dict(old)
    twin = sparse_comm.compact(mlp(), same_nnz_masks(masks))
    twin.load_state_dict(model.state_dict())
    assert same_state(twin.state_dict(), model.state_dict())


def test_mode_dtype_and_requires_grad_stay():
    options: dict[str, Any] = {"weights": "transient", "compute_dtype": torch.bfloat16}
    model = mlp().double()
    model[2].requires_grad_(False)
    sparse_comm.compact(model, random_masks(model), **options)
    sparse_comm.update_masks(model, other_masks(mlp(), seed=7))
    row = sparse_comm.summary(model).rows[2]
    assert (row.name, row.state, row.cache_bytes) == ("2.weight", "transient", 0)
    values = dict(model.named_parameters())["2.weight"]
    assert (values.dtype, values.requires_grad) == (torch.float64, False)
    assert model[2].weight.dtype == torch.bfloat16
