"""Magnitude pruning removes exactly the smallest entries, the same on every machine."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_comm.prune import magnitude
from sparse_comm.prune.magnitude import loads_of_each, smallest_pruned


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))


def model_of(*weights: torch.Tensor) -> nn.ParameterList:
    return nn.ParameterList([nn.Parameter(w, requires_grad=False) for w in weights])


def pruned_count(masks: dict[str, torch.Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def sorted_stably(weights: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The definition: a stable sort of all magnitudes in float64, the first ``count`` go."""
    flat = torch.cat([w.detach().double().abs().flatten() for w in weights]).numpy()
    mask = np.ones(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:count]] = False
    parts = torch.from_numpy(mask).split([w.numel() for w in weights])
    return [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 0.999, 1])
def test_global_scope_prunes_exactly_the_smallest_of_all_entries(sparsity):
    model = small_model()
    weights = [p for p in model.parameters() if p.ndim == 2]
    masks = magnitude(model, sparsity)
    assert list(masks) == ["0.weight", "1.weight", "3.weight"]
    total = sum(w.numel() for w in weights)
    assert pruned_count(masks) == round(sparsity * total)
    expected = sorted_stably(weights, round(sparsity * total))
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), expected, strict=True))


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.9, 1])
def test_layer_scope_prunes_exactly_the_same_fraction_of_each_parameter(sparsity):
    model = small_model()
    masks = magnitude(model, sparsity, scope="layer")
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        count = round(sparsity * weight.numel())
        assert int((~mask).sum()) == count
        assert torch.equal(mask, sorted_stably([weight], count)[0])


def test_the_default_is_ninety_percent_of_all_weights():
    model = small_model()
    total = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert pruned_count(magnitude(model)) == round(0.9 * total)


def test_masks_are_bool_tensors_of_the_parameters_shapes():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv1d(5, 2, 4))
    for name, mask in magnitude(model, 0.5).items():
        assert mask.dtype == torch.bool and mask.shape == model.get_parameter(name).shape


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, float("inf")]), min_size=1, max_size=60),
    st.integers(0, 60),
    st.floats(0, 1),
)
def test_ties_are_pruned_in_the_order_of_names_and_then_of_entries(numbers, cut, sparsity):
    weights = [torch.tensor([numbers[:cut]]), torch.tensor([numbers[cut:]])]
    masks = magnitude(model_of(*weights), sparsity)
    expected = sorted_stably(weights, round(sparsity * len(numbers)))
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), expected, strict=True))


def test_ties_go_by_name_wherever_the_parameter_stands_in_the_model():
    model = nn.ModuleDict({name: nn.Linear(4, 1, bias=False) for name in ("b", "a", "c")})
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    masks = magnitude(model, 0.5)
    assert list(masks) == ["b.weight", "a.weight", "c.weight"]  # the model's order
    assert not masks["a.weight"].any() and bool(masks["c.weight"].all())
    assert masks["b.weight"].tolist() == [[False, False, True, True]]


def test_ties_are_right_across_the_chunks_of_a_large_parameter():
    weights = [torch.ones(3, 1 << 20), torch.ones(2, 1000), torch.full((5, 5), 0.5)]
    count = 25 + (1 << 21) + 7
    total = sum(w.numel() for w in weights)
    masks = magnitude(model_of(*weights), count / total)
    assert not masks["0"].flatten()[: (1 << 21) + 7].any()
    assert bool(masks["0"].flatten()[(1 << 21) + 7 :].all())
    assert bool(masks["1"].all()) and not masks["2"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_compared_exactly_down_to_neighbouring_and_denormal_numbers(dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    torch.manual_seed(0)
    top = torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(integer).item()
    steps = torch.cat([torch.arange(300), top - torch.arange(300)]).to(integer)
    weight = steps.view(dtype)[torch.randperm(600)].reshape(20, 30)
    weight = weight * (torch.rand(20, 30) < 0.5).to(dtype).mul(2).sub(1)  # random signs
    for sparsity in (0.25, 0.5, 0.8):
        mask = magnitude(model_of(weight), sparsity)["0"]
        assert torch.equal(mask, sorted_stably([weight], round(sparsity * 600))[0])


def test_mixed_dtypes_are_compared_by_exact_value():
    third = torch.tensor([[1 / 3]], dtype=torch.float64)
    weights = [third.float(), third, third.bfloat16(), third.half()]
    for count in range(5):
        masks = magnitude(model_of(*weights), count / 4)
        expected = sorted_stably(weights, count)
        assert all(torch.equal(a, b) for a, b in zip(masks.values(), expected, strict=True))


def test_memory_layout_and_number_of_threads_do_not_matter():
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 5, 5).round(decimals=1)  # many ties
    expected = magnitude(model_of(weight), 0.7)["0"]
    laid_out = model_of(weight.to(memory_format=torch.channels_last))
    assert torch.equal(magnitude(laid_out, 0.7)["0"], expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(magnitude(model_of(weight), 0.7)["0"], expected)
    finally:
        torch.set_num_threads(threads)


def test_infinities_are_largest_and_nan_is_refused_by_name():
    weight = torch.tensor([[float("-inf"), 1.0, 3.4e38, float("inf")]])
    assert magnitude(model_of(weight), 0.5)["0"].tolist() == [[True, False, False, True]]
    model = small_model()
    model[3].weight.data[1, 2] = float("nan")
    for sparsity in (0, 0.5):
        with pytest.raises(ValueError, match=r"'3.weight' holds NaN"):
            magnitude(model, sparsity)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_nan_of_any_sign_and_payload_is_told_from_infinity(scope, dtype):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = torch.tensor(float("inf"), dtype=dtype)
    for factor in (1, -1):
        just_above = (infinity * factor).view(integer) + 1  # the smallest payload
        weight = torch.stack([infinity, just_above.view(dtype)]).reshape(1, 2)
        with pytest.raises(ValueError, match="'0' holds NaN"):
            magnitude(model_of(weight), 0.5, scope)
    assert magnitude(model_of(infinity.expand(1, 2)), 0.5, scope)["0"].tolist() == [[False, True]]


def test_the_model_is_left_as_it_is():
    model = small_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    versions = [p._version for p in model.parameters()]
    magnitude(model, 0.5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert versions == [p._version for p in model.parameters()]


def test_a_tied_parameter_counts_once_and_either_name_picks_it():
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8))
    model[1].weight = model[0].weight
    masks = magnitude(model, 0.5)
    assert list(masks) == ["0.weight"] and pruned_count(masks) == 24
    assert list(magnitude(model, 0.5, names=["1.weight"])) == ["0.weight"]


def test_names_pick_parameters_of_any_dimension_in_the_models_order():
    masks = magnitude(small_model(), 0.5, names=["3.weight", "1.bias"])
    assert list(masks) == ["1.bias", "3.weight"]
    assert list(magnitude(small_model(), 0.5, names=iter(["3.weight"]))) == ["3.weight"]


def test_a_predicate_picks_among_the_default_parameters():
    masks = magnitude(small_model(), 0.5, names=lambda name, parameter: parameter.shape[1] == 6)
    assert list(masks) == ["0.weight", "1.weight"]


def test_empty_and_integer_parameters_do_no_harm():
    model = small_model()
    model.nothing = nn.Parameter(torch.empty(0, 5))
    model.codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    for scope in ("global", "layer"):
        masks = magnitude(model, 0.5, scope)
        assert masks["nothing"].shape == (0, 5) and "codes" not in masks


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float64], [torch.half, torch.float]])
def test_weights_need_not_be_in_memory_together(scope, dtypes):
    torch.manual_seed(0)
    kept = {str(i): torch.randn(40, 50).to(dtypes[i % len(dtypes)]) for i in range(12)}
    meta = {name: weight.to("meta") for name, weight in kept.items()}
    loaded: list[weakref.ref[torch.Tensor]] = []

    def load(name: str) -> torch.Tensor:
        assert not any(weight() is not None for weight in loaded)
        weight = kept[name].clone()
        loaded.append(weakref.ref(weight))
        return weight

    model = nn.Module()
    for name in kept:
        model.register_parameter(name, nn.Parameter(kept[name]))
    masks = dict(smallest_pruned(meta, 0.7, scope, load))
    assert len(loaded) == 12 * loads_of_each(meta, scope)
    expected = magnitude(model, 0.7, scope)
    assert list(masks) == sorted(kept) and masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.5}, ValueError, "sparsity must be between 0 and 1, got 1.5"),
        ({"sparsity": -0.1}, ValueError, "between 0 and 1"),
        ({"sparsity": float("nan")}, ValueError, "between 0 and 1"),
        ({"scope": "row"}, ValueError, "scope must be 'global' or 'layer', got 'row'"),
        ({"names": ["1.weigth"]}, ValueError, "no parameter '1.weigth'; did you mean '1.weight'"),
        ({"names": ["codes"]}, ValueError, "'codes' has dtype torch.int8"),
        ({"names": "1.weight"}, TypeError, r"write \['1.weight'\]"),
        ({"names": []}, ValueError, "no parameter to prune"),
        ({"names": lambda name, parameter: False}, ValueError, "no parameter to prune"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, error, message):
    model = small_model()
    model.codes = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(error, match=message):
        magnitude(model, **arguments)


def test_models_without_data_or_matrices_are_refused():
    with pytest.raises(ValueError, match="'weight' is on the meta device"):
        magnitude(nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match="no parameter to prune"):
        magnitude(nn.LayerNorm(8))
