"""Masks say of each pruned parameter, by name, which entries are unpruned."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparse_comm
from sparse_comm.masks import validate_mask


def half_zero(parameter: nn.Parameter) -> torch.Tensor:
    """Zero about half of the entries in place; returns what is left, as a mask."""
    generator = torch.Generator().manual_seed(parameter.numel())
    mask = torch.rand(parameter.shape, generator=generator) < 0.5
    with torch.no_grad():
        parameter.mul_(mask)  # leaves -0.0 at half of the zeros
    return mask


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


# ---------------------------------------------------------------- masks_from_zeros


def test_partly_zero_matrices_get_a_mask_of_their_nonzero_entries():
    model = small_model()
    expected = half_zero(model[0].weight)
    masks = sparse_comm.masks_from_zeros(model)
    assert list(masks) == ["0.weight"]
    assert masks["0.weight"].dtype == torch.bool
    assert torch.equal(masks["0.weight"], expected)


def test_the_model_is_left_as_it_is():
    model = small_model()
    half_zero(model[0].weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sparse_comm.masks_from_zeros(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_and_nan_and_minus_zero_are_told_apart(dtype):
    model = nn.Linear(3, 2, bias=False).to(dtype)
    rows = [[0.0, -0.0, 1.0], [float("nan"), float("inf"), torch.finfo(dtype).smallest_normal]]
    model.weight.data.copy_(torch.tensor(rows, dtype=dtype))
    mask = sparse_comm.masks_from_zeros(model)["weight"]
    assert mask.tolist() == [[False, False, True], [True, True, True]]


def test_zero_biases_and_norm_weights_are_not_taken_for_pruned():
    model = small_model()
    half_zero(model[2].weight)
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].weight)
    assert list(sparse_comm.masks_from_zeros(model)) == ["2.weight"]


def test_an_all_zero_matrix_stays_dense_and_a_warning_names_it():
    model = small_model()
    half_zero(model[0].weight)
    nn.init.zeros_(model[2].weight)
    with pytest.warns(UserWarning, match="all zero get no mask and stay dense: '2.weight'"):
        assert list(sparse_comm.masks_from_zeros(model)) == ["0.weight"]


def test_a_model_without_zeros_has_no_masks_and_a_warning_says_so():
    with pytest.warns(UserWarning, match="there are no masks"):
        assert sparse_comm.masks_from_zeros(small_model()) == {}


@pytest.mark.parametrize("row", [0, 3, 9])
def test_the_padding_row_alone_does_not_make_an_embedding_pruned(row):
    model = nn.Sequential(nn.Embedding(10, 4, padding_idx=row), nn.Linear(4, 3))
    half_zero(model[1].weight)
    assert list(sparse_comm.masks_from_zeros(model)) == ["1.weight"]
    with torch.no_grad():
        model[0].weight[5, 2] = 0
    mask = sparse_comm.masks_from_zeros(model)["0.weight"]
    assert mask.logical_not().sum() == 5 and not mask[5, 2] and not mask[row].any()


def test_a_tied_parameter_has_one_mask_under_its_first_name():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8))
    model[1].weight = model[0].weight
    expected = half_zero(model[0].weight)
    masks = sparse_comm.masks_from_zeros(model)
    assert list(masks) == ["0.weight"] and torch.equal(masks["0.weight"], expected)


def test_integer_and_empty_parameters_get_no_mask():
    model = small_model()
    half_zero(model[0].weight)
    model.codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    model.nothing = nn.Parameter(torch.empty(0, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(sparse_comm.masks_from_zeros(model)) == ["0.weight"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3, device="meta"), "'weight' is on the meta device; load the weights"),
        (nn.LazyLinear(3), "'weight' is a lazy parameter"),
    ],
)
def test_parameters_without_data_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        sparse_comm.masks_from_zeros(model)


def test_a_model_still_pruned_by_torch_is_sent_to_the_other_function():
    model = small_model()
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(ValueError, match="use masks_from_torch_prune"):
        sparse_comm.masks_from_zeros(model)


# ---------------------------------------------------------------- masks_from_torch_prune


def is_ordinary(model: nn.Module) -> bool:
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return not prune.is_pruned(model) and not any(n.endswith(("_orig", "_mask")) for n in names)


def test_pruned_weights_become_ordinary_parameters_with_zeros_and_a_mask():
    model = small_model()
    x = torch.randn(5, 6)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2], "weight", 0.25)
    expected = {f"{i}.weight": model[i].weight_mask.bool() for i in (0, 2)}
    weights = {f"{i}.weight": model[i].weight.detach().clone() for i in (0, 2)}
    out = model(x)
    masks = sparse_comm.masks_from_torch_prune(model)
    assert list(masks) == ["0.weight", "2.weight"] and is_ordinary(model)
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad
        assert mask.dtype == torch.bool and torch.equal(mask, expected[name])
        assert torch.equal(parameter, weights[name])
    assert torch.equal(model(x), out)


def test_an_unpruned_entry_that_is_zero_stays_unpruned():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data.copy_(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    mask = torch.tensor([[True, False, True], [True, True, False]])
    prune.custom_from_mask(model, "weight", mask)
    assert torch.equal(sparse_comm.masks_from_torch_prune(model)["weight"], mask)
    assert model.weight.tolist() == [[0, 0, 2], [3, 4, 0]]


def test_pruned_entries_are_plus_zero_whatever_stood_there():
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[-1.0, float("inf"), float("nan"), -2.0]]))
    prune.custom_from_mask(model, "weight", torch.tensor([[0, 0, 0, 1]]))
    sparse_comm.masks_from_torch_prune(model)
    assert model.weight.tolist() == [[0, 0, 0, -2]]
    assert not model.weight.detach().signbit()[0, :3].any()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_built_on_the_pruned_model_goes_on_training_the_same_parameter(
    optimizer_class,
):
    model = small_model()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[0], "bias", 0.5)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    original, x = model[0].weight_orig, torch.randn(5, 6)
    model(x).sum().backward()
    optimizer.step()
    model(x)  # the pruning hook shows the weights after the step
    after_step = model[0].weight.detach().clone()
    masks = sparse_comm.masks_from_torch_prune(model)
    assert model[0].weight is original and torch.equal(model[0].weight, after_step)
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    changed = model[0].weight.detach() != after_step
    assert bool(changed[masks["0.weight"]].all())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= held


def test_the_order_of_parameters_stays_so_that_saved_optimizer_state_still_fits():
    model = nn.Bilinear(3, 4, 5)
    prune.l1_unstructured(model, "weight", 0.5)
    prune.l1_unstructured(model, "bias", 0.5)
    prune.random_unstructured(model, "weight", 0.1)  # its hook now comes last
    shapes = [p.shape for p in model.parameters()]
    sparse_comm.masks_from_torch_prune(model)
    assert [p.shape for p in model.parameters()] == shapes


def test_iterated_and_structured_pruning_give_the_mask_of_all_steps():
    model = nn.Conv2d(4, 6, 3)
    prune.l1_unstructured(model, "weight", 0.5)
    prune.ln_structured(model, "weight", 0.5, n=2, dim=0)
    assert isinstance(next(iter(model._forward_pre_hooks.values())), prune.PruningContainer)
    expected = model.weight_mask.bool()
    masks = sparse_comm.masks_from_torch_prune(model)
    assert torch.equal(masks["weight"], expected) and is_ordinary(model)
    assert not masks["weight"].flatten(1).any(1).all()


def test_global_pruning_and_pruned_biases_are_read():
    model = small_model()
    tensors = [(model[0], "weight"), (model[0], "bias"), (model[2], "weight")]
    prune.global_unstructured(tensors, pruning_method=prune.L1Unstructured, amount=0.5)
    masks = sparse_comm.masks_from_torch_prune(model)
    assert set(masks) == {"0.weight", "0.bias", "2.weight"} and is_ordinary(model)
    sizes = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == sizes - round(0.5 * sizes)
    assert bool((model[0].bias[~masks["0.bias"]] == 0).all())


def test_other_hooks_stay():
    model = small_model()
    calls = []
    model[0].register_forward_pre_hook(lambda module, inputs: calls.append("pre"))
    prune.identity(model[0], "weight")
    masks = sparse_comm.masks_from_torch_prune(model)
    model(torch.randn(2, 6))
    assert calls == ["pre"] and bool(masks["0.weight"].all())


def test_a_module_used_twice_gives_one_mask_under_its_first_name():
    layer = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(6, 6)})
    prune.l1_unstructured(layer, "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = sparse_comm.masks_from_torch_prune(model)
    assert list(masks) == ["a.weight"] and model["b"].weight is model["a"].weight


def test_tied_parameters_pruned_alike_stay_tied_and_have_one_mask():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    model[1].weight = model[0].weight
    mask = torch.rand(8, 6) < 0.5
    for module in model:
        prune.custom_from_mask(module, "weight", mask)
    out = model(torch.arange(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = sparse_comm.masks_from_torch_prune(model)
    assert list(masks) == ["0.weight"] and torch.equal(masks["0.weight"], mask)
    assert model[0].weight is model[1].weight and is_ordinary(model)
    assert torch.equal(model(torch.arange(8)), out)


def test_tied_parameters_pruned_differently_are_refused_and_the_model_is_unchanged():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    model[1].weight = model[0].weight
    prune.custom_from_mask(model[0], "weight", torch.rand(8, 6) < 0.5)
    prune.custom_from_mask(model[1], "weight", torch.rand(8, 6) < 0.5)
    out = model(torch.arange(8))
    with pytest.raises(
        ValueError, match=r"'0.weight' and '1.weight' are one parameter, but pruned"
    ):
        sparse_comm.masks_from_torch_prune(model)
    assert prune.is_pruned(model) and torch.equal(model(torch.arange(8)), out)


def test_a_tied_parameter_pruned_in_one_place_is_pruned_in_both_with_a_warning():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.warns(UserWarning, match="'1.weight' is the same parameter as '0.weight'"):
        masks = sparse_comm.masks_from_torch_prune(model)
    assert list(masks) == ["0.weight"] and model[0].weight is model[1].weight
    assert bool((model[1].weight[~masks["0.weight"]] == 0).all())


def test_a_pruned_recurrent_layer_computes_what_it_did():
    torch.manual_seed(0)
    model = nn.LSTM(3, 4)
    prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    prune.l1_unstructured(model, "weight_ih_l0", 0.5)
    x = torch.randn(5, 2, 3)
    out = model(x)[0]
    masks = sparse_comm.masks_from_torch_prune(model)
    assert set(masks) == {"weight_hh_l0", "weight_ih_l0"}
    assert torch.equal(model(x)[0], out)
    model.weight_hh_l0.data.zero_()  # the layer reads its parameters, not copies of them
    assert not torch.equal(model(x)[0], out)


def test_a_model_that_is_not_pruned_gives_nothing_and_a_warning():
    model = small_model()
    prune.l1_unstructured(model[0], "weight", 0.5)
    sparse_comm.masks_from_torch_prune(model)
    with pytest.warns(UserWarning, match="if the pruning was made permanent already"):
        assert sparse_comm.masks_from_torch_prune(model) == {}


def test_a_pruning_hook_without_its_tensors_is_refused():
    model = small_model()
    prune.l1_unstructured(model[0], "weight", 0.5)
    del model[0]._buffers["weight_mask"]
    with pytest.raises(ValueError, match=r"'0.weight' has a pruning hook but not"):
        sparse_comm.masks_from_torch_prune(model)


def test_masks_from_torch_prune_and_from_zeros_agree_where_no_unpruned_weight_is_zero():
    model = small_model()
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.5)
    masks = sparse_comm.masks_from_torch_prune(model)
    zeros = sparse_comm.masks_from_zeros(model)
    assert list(zeros) == list(masks)
    assert all(torch.equal(masks[name], zeros[name]) for name in masks)


# ---------------------------------------------------------------- validate_mask


@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 6), (2, 3, 4)])
def test_a_bool_mask_of_the_parameters_shape_is_accepted(shape):
    validate_mask("w", torch.ones(shape, dtype=torch.bool), torch.zeros(shape))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.ones(64, 64, dtype=torch.bool),
            ValueError,
            r"mask for 'blocks.3.mlp.weight' has shape \(64, 64\), the parameter \(64, 256\)$",
        ),
        (
            torch.ones(256, 64, dtype=torch.bool),
            ValueError,
            r"has shape \(256, 64\), the parameter \(64, 256\): it is transposed; pass mask.mT",
        ),
        (
            torch.ones(64 * 256, dtype=torch.bool),
            ValueError,
            "the same number of entries, but another layout",
        ),
        (
            torch.ones(64, 256),
            TypeError,
            "mask for 'blocks.3.mlp.weight' must have dtype torch.bool, got torch.float32",
        ),
        ([[True]], TypeError, "must be a torch.Tensor, got list"),
        (None, TypeError, "must be a torch.Tensor, got NoneType"),
        (torch.ones(64, 256, dtype=torch.bool, device="meta"), TypeError, "meta device"),
        (torch.ones(64, 256, dtype=torch.bool).to_sparse(), TypeError, "pass mask.to_dense"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(mask, error, message):
    with pytest.raises(error, match=message):
        validate_mask("blocks.3.mlp.weight", mask, torch.zeros(64, 256))
