"""State dicts go in and out, dense and compact; what does not fit is refused whole."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_comm
from sparse_comm.compact import link
from tests.compact.models import (
    ConvNet,
    Masks,
    Tied,
    batch,
    everything,
    mlp,
    pair,
    pruned_are_zero,
    random_masks,
    same_bits,
    same_nnz_masks,
    same_state,
    same_weights,
    seeded,
    train,
)

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "conv net": lambda: seeded(ConvNet),
    "tied": lambda: seeded(Tied),
}
both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])
all_models = pytest.mark.parametrize("model", MODELS)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def trained_pair(
    model: str = "mlp", masks: Masks | None = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A masked dense and a compact model of the same weights, not those of their making."""
    dense, compact, masks = pair(MODELS[model], masks, **options)
    train(dense, adamw(dense), masks, steps=2)
    train(compact, adamw(compact), steps=2)
    assert same_weights(dense, compact)
    return dense, compact


def fresh(model: str = "mlp", **options: Any) -> nn.Module:
    """A compact model of the same masks as ``trained_pair``, of other weights, forward done."""
    made = MODELS[model]()
    sparse_comm.compact(made, random_masks(made), **options)
    made(batch(0)[0])
    return made


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(batch(5)[0])


# ---------------------------------------------------------------- in both directions


@both_modes
@all_models
@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_is_packed_when_it_is_loaded(model, weights, assign):
    dense, _ = trained_pair(model)
    compact = fresh(model, weights=weights)
    loaded = compact.load_state_dict(dense.state_dict(), assign=assign)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert same_weights(dense, compact)
    assert torch.equal(outputs(compact), outputs(dense))


@both_modes
@all_models
@pytest.mark.parametrize("assign", [False, True])
def test_a_compact_state_is_loaded_as_it_is(model, weights, assign):
    dense, source = trained_pair(model)
    compact = fresh(model, weights=weights)
    loaded = compact.load_state_dict(source.state_dict(), assign=assign)
    assert loaded.missing_keys == loaded.unexpected_keys == []
    assert same_state(compact.state_dict(), source.state_dict())
    assert torch.equal(outputs(compact), outputs(dense))


@all_models
def test_the_dense_state_dict_is_what_a_plain_model_saves_and_loads(model):
    dense, compact = trained_pair(model)
    plain = MODELS[model]()
    state = sparse_comm.dense_state_dict(compact)
    plain.load_state_dict(state)
    assert same_state(state, dense.state_dict())
    assert same_state(plain.state_dict(), dense.state_dict())
    assert torch.equal(outputs(plain), outputs(dense))
    assert same_state(sparse_comm.dense_state_dict(plain), plain.state_dict())


def test_dense_weights_that_are_not_zero_where_pruned_are_dropped_with_a_warning(monkeypatch):
    monkeypatch.setattr(link, "_warned_dropped", False)
    compact, state = fresh(), mlp().state_dict()
    with pytest.warns(UserWarning, match=r"'0\.weight' has non-zero entries where it is pruned"):
        compact.load_state_dict(state)
    assert pruned_are_zero(compact)
    mask = sparse_comm.masks_of(compact)["0.weight"]
    assert same_bits(sparse_comm.dense_state_dict(compact)["0.weight"], state["0.weight"] * mask)


def test_a_state_dict_is_not_changed_by_loading_it():
    dense, source = trained_pair()
    for state in (dense.state_dict(), source.state_dict()):
        before = {name: tensor.clone() for name, tensor in state.items()}
        fresh().load_state_dict(state)
        assert same_state(state, before)


def test_missing_and_unexpected_names_are_reported_as_by_any_module():
    dense, source = trained_pair()
    for given in (dense, source):
        state = dict(given.state_dict(), other=torch.ones(2))
        del state["2.weight"]
        compact = fresh()
        kept = compact.get_parameter("2.weight").detach().clone()
        with pytest.raises(
            RuntimeError, match=r'Missing key.*"2\.weight"(.|\n)*Unexpected.*"other"'
        ):
            compact.load_state_dict(state)
        compact = fresh()
        loaded = compact.load_state_dict(state, strict=False)
        assert loaded.missing_keys == ["2.weight"]
        assert loaded.unexpected_keys == ["other"]
        assert torch.equal(compact[2].weight, kept)
        assert torch.equal(compact[0].weight, dense[0].weight)


def test_a_plain_model_refuses_a_compact_state():
    _, source = trained_pair()
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        mlp().load_state_dict(source.state_dict())


# ---------------------------------------------------------------- refused whole


class Deep(nn.Sequential):
    """Layers within layers, and one that has nothing compact, before all others."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.LayerNorm(33),
            nn.Sequential(nn.Linear(33, 33), nn.Sequential(nn.Linear(33, 33), nn.Linear(33, 7))),
        )


def states_that_do_not_fit(of: nn.Module) -> dict[str, dict[str, Tensor]]:
    """By what the message says; only the last masked parameter is bad."""
    masks, name = sparse_comm.masks_of(of), "1.1.1.weight"
    other = Deep()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2).add_(1)
    sparse_comm.compact(other, {**masks, name: same_nnz_masks(masks)[name]})
    wrong = dict(sparse_comm.dense_state_dict(other), **{name: torch.ones(7, 34)})
    return {"holds the values of another pattern": other.state_dict(), "shape (7, 34)": wrong}


@both_modes
@pytest.mark.parametrize("prefix", ["", "1.", "1.1.", "1.1.1."])
def test_of_a_state_that_does_not_fit_nothing_is_loaded_not_into_other_modules_either(
    weights, prefix
):
    model = Deep()
    sparse_comm.compact(model, random_masks(model), weights=weights)
    part = model.get_submodule(prefix[:-1])
    for reason, state in states_that_do_not_fit(model).items():
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        before = everything(model)
        for strict in (True, False):
            with pytest.raises(RuntimeError) as caught:
                part.load_state_dict(state, strict=strict)
            name = "1.1.1.weight".removeprefix(prefix)
            assert f"{name!r}" in str(caught.value)
            assert reason in str(caught.value)
            assert "nothing was loaded" in str(caught.value)
            assert everything(model) == before


def test_the_digest_belongs_to_one_pattern_whatever_the_nnz():
    masks = random_masks(mlp())
    others = {name: ~mask for name, mask in masks.items()}
    _, source = trained_pair(masks=others)
    compact = fresh()
    assert source.state_dict()["0.weight"].shape != compact.state_dict()["0.weight"].shape
    with pytest.raises(RuntimeError, match=r"'0\.weight' has shape"):
        compact.load_state_dict(source.state_dict())
    with warnings.catch_warnings(action="ignore"):  # of what is dropped: all of it
        compact.load_state_dict(sparse_comm.dense_state_dict(source))
    assert not any(compact.get_parameter(name).count_nonzero() for name in masks)


def test_a_state_that_lost_its_digests_is_loaded_with_one_warning():
    dense, source = trained_pair()
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("_extra_state")}
    compact = fresh()
    with pytest.warns(UserWarning, match=r"'0\.weight' and 2 more without the digest") as caught:
        compact.load_state_dict(state)
    assert len(caught) == 1
    assert same_weights(dense, compact)


# ---------------------------------------------------------------- under a prefix, and wrapped


class Parent(nn.Module):
    """A plain module around the model, as a trainer has."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.scale = model, nn.Parameter(torch.ones(2))


def in_ddp(model: nn.Module) -> nn.Module:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrap", [Parent, in_ddp])
def test_states_of_wrapped_models_fit_and_are_checked_too(wrap):
    dense, source = trained_pair()
    target = wrap(fresh())
    for wrapped in (wrap(source), wrap(dense)):
        target.load_state_dict(wrapped.state_dict())
        (inner,) = target.children()
        assert same_weights(dense, inner)
        inner.load_state_dict(fresh().state_dict())
    plain = wrap(mlp())
    plain.load_state_dict(sparse_comm.dense_state_dict(wrap(source)))
    assert same_state(plain.state_dict(), wrap(dense).state_dict())
    (prefix,) = (f"{name}." for name, _ in target.named_children())
    other = sparse_comm.compact(mlp(), same_nnz_masks(random_masks(mlp())))
    before = everything(inner)
    with pytest.raises(RuntimeError, match=f"'{prefix}0.weight' holds the values of another"):
        target.load_state_dict(wrap(other).state_dict())
    assert everything(inner) == before


class Counter(nn.Linear):
    """A layer with an extra state of its own."""

    def __init__(self, count: int) -> None:
        super().__init__(6, 5)
        self.count = count

    def get_extra_state(self) -> Any:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def test_a_modules_own_extra_state_is_kept_beside_the_digests():
    mask = torch.rand(5, 6) < 0.5
    source, target = (sparse_comm.compact(Counter(n), {"weight": mask}) for n in (3, 0))
    target.load_state_dict(source.state_dict())
    assert (target.count, torch.equal(target.weight, source.weight)) == (3, True)
    plain = Counter(0)
    plain.load_state_dict(sparse_comm.dense_state_dict(source))
    assert (plain.count, torch.equal(plain.weight, source.weight)) == (3, True)
    target.load_state_dict(Counter(7).state_dict())
    assert target.count == 7
    other = sparse_comm.compact(Counter(1), {"weight": mask.flatten().roll(1).reshape(5, 6)})
    with pytest.raises(RuntimeError, match="'weight' holds the values of another pattern"):
        target.load_state_dict(other.state_dict())
    assert target.count == 7
    within = nn.Sequential(Counter(4), nn.Linear(5, 2))  # the module itself stays dense
    sparse_comm.compact(within, {"1.weight": torch.ones(2, 5, dtype=torch.bool)})
    assert within.state_dict()["0._extra_state"] == {"count": 4}


# ---------------------------------------------------------------- through files, and copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_saved_state_needs_no_pickled_code_to_load():
    dense, source = trained_pair()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    compact = fresh()
    compact.load_state_dict(torch.load(file, weights_only=True))
    assert same_weights(dense, compact)


@both_modes
@all_models
@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_equal_independent_and_trains_the_same(model, weights, copied):
    _, compact = trained_pair(model, weights=weights)
    twin = copied(compact)
    assert sparse_comm.is_compact(twin)
    assert type(twin) is type(compact)
    assert same_state(twin.state_dict(), compact.state_dict())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in compact.named_parameters()]
    before = outputs(compact).clone()
    masks = sparse_comm.masks_of(compact)
    # fused: its writes are noticed by the copy's own values only
    fused = [torch.optim.AdamW(m.parameters(), 1e-2, fused=True) for m in (twin, compact)]
    losses = train(twin.train(), fused[0], steps=3)
    assert torch.equal(outputs(compact), before)
    assert train(compact.train(), fused[1], steps=3) == losses
    assert same_state(twin.state_dict(), compact.state_dict())
    assert all(same_bits(m, masks[n]) for n, m in sparse_comm.masks_of(twin).items())
    assert pruned_are_zero(twin)


@both_modes
def test_conversion_to_another_dtype_and_back_is_that_of_the_dense_model(weights):
    dense, compact = trained_pair(weights=weights)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        dense.to(dtype)
        compact.to(dtype)
        assert same_weights(dense, compact)
        assert compact[0].weight.dtype == dtype
        x = batch(0)[0].to(dtype)
        assert torch.equal(compact(x), dense(x))
    compact = sparse_comm.compact(
        mlp(), random_masks(mlp()), weights=weights, compute_dtype=torch.bfloat16
    )
    assert compact.double()[0].weight.dtype == torch.bfloat16


@both_modes
def test_a_model_may_be_made_on_the_meta_device_and_get_its_weights_later(weights):
    dense, source = trained_pair()
    for state in (dense.state_dict(), source.state_dict()):
        for assign in (False, True):
            with torch.device("meta"):
                compact = mlp()
            sparse_comm.compact(compact, random_masks(mlp()), weights=weights)
            assert compact[0].weight.is_meta
            if not assign:
                compact.to_empty(device="cpu")
            compact.load_state_dict(state, assign=assign)
            assert same_weights(dense, compact)
            assert torch.equal(outputs(compact), outputs(dense))


def test_what_is_tied_stays_tied_in_the_dense_state_dict():
    model = seeded(Tied)
    sparse_comm.compact(model, random_masks(model))
    state = sparse_comm.dense_state_dict(model)
    assert state["out.weight"] is state["embed.weight"]
    assert state["middle.weight"] is not state["embed.weight"]
