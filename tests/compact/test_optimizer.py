"""Optimizers are carried over with their state, noticed whatever they write, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import (
    Tied,
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
    zero_pruned_,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW single": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, weight_decay=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "ASGD": lambda p: torch.optim.ASGD(p, 1e-2),
}
both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, **options)


def compact_model(**options: Any) -> nn.Module:
    return sparse_comm.compact(mlp(), random_masks(mlp()), **options)


def with_gradients(model: nn.Module) -> nn.Module:
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    return model


def twins(
    make: Callable[[Any], torch.optim.Optimizer], model: Callable[[], nn.Module] = mlp
) -> Any:
    """Two masked dense models of equal weights with an optimizer each, and the masks."""
    dense = model()
    masks = random_masks(dense)
    zero_pruned_(dense, masks)
    other = copy.deepcopy(dense)
    return dense, make(dense.parameters()), other, make(other.parameters()), masks


# ---------------------------------------------------------------- carried over


@both_modes
@pytest.mark.parametrize("steps_before", [0, 5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_the_model_had_stayed_dense(optimizer, steps_before, weights):
    dense, of_dense, other, of_other, masks = twins(OPTIMIZERS[optimizer])
    for model, its in ((dense, of_dense), (other, of_other)):
        train(model, its, masks, steps_before)
    sparse_comm.compact(other, masks, weights=weights, optimizer=of_other)
    how: dict[str, Any] = {"steps": 10, "first": steps_before}
    assert train(other, of_other, **how) == train(dense, of_dense, masks, **how)
    assert same_weights(dense, other)
    assert same_optimizer_state((dense, of_dense), (other, of_other))


def test_groups_keep_their_order_options_and_other_parameters():
    model = mlp()
    groups = [
        {"params": [model[4].bias, model[4].weight], "lr": 0.5, "weight_decay": 0.3},
        {"params": [model[0].weight], "betas": (0.8, 0.9)},
        {"params": [model[0].bias, *model[3].parameters()], "name": "norms"},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-2)
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    bias = model[4].bias
    sparse_comm.compact(model, random_masks(model), optimizer=optimizer)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups] == [
        ["4.bias", "4.weight"],
        ["0.weight"],
        ["0.bias", "3.weight", "3.bias"],
    ]
    assert optimizer.param_groups[0]["params"][0] is bias
    assert [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ] == options


@both_modes
def test_groups_with_their_own_decay_and_a_scheduler_go_on(weights):
    def grouped(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        decays = {"params": [first], "weight_decay": 0.5}
        return torch.optim.AdamW([decays, {"params": rest, "lr": 1e-3}], 1e-2)

    dense, of_dense, other, of_other, masks = twins(grouped)
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(its, max_lr=[0.1, 0.01], total_steps=20)
        for its in (of_dense, of_other)
    ]
    for model, its, schedule in zip((dense, other), (of_dense, of_other), schedules, strict=True):
        train(model, its, masks, 5, after_step=schedule.step)
    sparse_comm.compact(other, masks, weights=weights, optimizer=of_other)
    how: dict[str, Any] = {"steps": 14, "first": 5}
    expected = train(dense, of_dense, masks, after_step=schedules[0].step, **how)
    assert train(other, of_other, after_step=schedules[1].step, **how) == expected
    assert schedules[1].get_last_lr() == schedules[0].get_last_lr()
    assert same_weights(dense, other)


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"maximize": True}])
def test_options_stay_and_state_has_the_values_shape(options):
    model = mlp()
    optimizer = adamw(model, **options)
    train(model, optimizer, steps=2)
    before = {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}
    masks = random_masks(model)
    sparse_comm.compact(model, masks, optimizer=optimizer)
    for name, values in model.named_parameters():
        state = optimizer.state[values]
        assert state["step"] is before[name]["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            dense = before[name][key]
            assert torch.equal(state[key], dense[masks[name]] if name in masks else dense)
    for key, value in options.items():
        assert optimizer.param_groups[0][key] == value
    train(model, optimizer, steps=1)


def test_saved_optimizer_state_fits_an_optimizer_built_on_the_compact_model():
    dense, of_dense, other, of_other, masks = twins(OPTIMIZERS["AdamW single"])
    for model, its in ((dense, of_dense), (other, of_other)):
        train(model, its, masks, 5)
    sparse_comm.compact(other, masks, optimizer=of_other)
    again = compact_model()
    its = adamw(again)
    again.load_state_dict(other.state_dict())
    its.load_state_dict(of_other.state_dict())
    expected = train(dense, of_dense, masks, 5, first=5)
    assert train(again, its, steps=5, first=5) == expected


def test_a_tied_parameter_has_one_state():
    dense, of_dense, other, of_other, masks = twins(OPTIMIZERS["SGD"], lambda: seeded(Tied))
    for model, its in ((dense, of_dense), (other, of_other)):
        train(model, its, masks, 3)
    sparse_comm.compact(other, masks, optimizer=of_other)
    assert len(of_other.state) == len(of_dense.state) == len(list(other.parameters()))
    assert train(other, of_other, steps=3, first=3) == train(dense, of_dense, masks, 3, first=3)


def test_the_count_of_steps_is_no_state_of_a_number():
    """Both have the shape (): a parameter that is one number, and Adam's count of steps."""
    model = nn.Linear(3, 2)
    model.scale = nn.Parameter(torch.tensor(2.0))
    optimizer = adamw(model)
    for last in (False, True):
        (model(torch.ones(1, 3)) * model.scale).sum().backward()
        optimizer.step()
        if not last:
            sparse_comm.compact(model, {"scale": torch.tensor(False)}, optimizer=optimizer)
    state = optimizer.state[dict(model.named_parameters())["scale"]]
    assert (state["step"], state["exp_avg"].shape) == (2, (0,))


def test_lbfgs_which_keeps_a_list_of_its_own_is_carried_over():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    sparse_comm.compact(model, random_masks(model), optimizer=optimizer)
    x, y = batch(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = closure().item()
    weight = model[0].weight.detach().clone()
    optimizer.step(closure)
    assert closure().item() < before
    assert not torch.equal(model[0].weight, weight)


# ---------------------------------------------------------------- writes are noticed


class ByPointer(torch.optim.Optimizer):
    """Plain SGD that writes through ``.data``, as DeepSpeed's and apex's optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)


@both_modes
def test_an_optimizer_that_bumps_no_version_leaves_no_stale_weight(weights):
    dense, compact, masks = pair(weights=weights)
    expected = train(dense, torch.optim.SGD(dense.parameters(), 0.1), masks, 5)
    assert train(compact, ByPointer(compact.parameters()), steps=5) == pytest.approx(expected)
    copied = copy.deepcopy(compact)
    expected = train(dense, torch.optim.SGD(dense.parameters(), 0.1), masks, 3)
    assert train(copied, ByPointer(copied.parameters()), steps=3) == pytest.approx(expected)


@both_modes
def test_what_is_no_torch_optimizer_and_bumps_no_version_must_say_so(weights):
    dense, compact, masks = pair(weights=weights)
    for model in (dense, compact):
        with_gradients(model)
        for p in model.parameters():
            p.data.sub_(0.1 * p.grad)
    zero_pruned_(dense, masks)
    sparse_comm.values_changed(compact)
    x, _ = batch(1)
    assert torch.equal(compact(x), dense(x))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method")
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_step_leaves_no_stale_weight(fused):
    dense, compact, masks = pair(weights="cached")

    class Compiled:
        """An optimizer to ``train`` with."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.zero_grad = optimizer.zero_grad
            self.step = torch.compile(optimizer.step, backend="aot_eager")

    torch._dynamo.reset()
    expected = train(dense, adamw(dense, fused=fused), masks, 5)
    losses = train(compact, Compiled(adamw(compact, fused=fused)), steps=5)  # type: ignore[arg-type]
    assert losses == pytest.approx(expected, rel=1e-5)
    x, _ = batch(1)
    assert torch.equal(compact(x), sparse_comm.densify(copy.deepcopy(compact))(x))


# ---------------------------------------------------------------- refused at the first step

REPLACED = r"holds the parameter '0\.weight' as it was before.*build the optimizer afterwards, or"


def refuses(optimizer: torch.optim.Optimizer, model: nn.Module, error: Any, match: str) -> None:
    """The step is refused, and again, and changes nothing."""
    with_gradients(model)
    for step in (optimizer.step, optimizer.step, torch.compile(optimizer.step, backend="eager")):
        before = everything(model, optimizer)
        with pytest.raises(error, match=match):
            step()
        assert everything(model, optimizer) == before


@pytest.mark.parametrize("steps_before", [0, 1])
def test_an_optimizer_of_the_dense_parameters_is_told_at_its_next_step(steps_before):
    model = mlp()
    optimizer = adamw(model)
    train(model, optimizer, steps=steps_before)
    sparse_comm.compact(model, random_masks(model))
    refuses(optimizer, model, RuntimeError, REPLACED)


def test_an_optimizer_of_the_values_is_told_after_densify_and_update_masks():
    for change in (
        sparse_comm.densify,
        lambda m: sparse_comm.update_masks(m, random_masks(mlp(), seed=5)),
    ):
        model = compact_model()
        optimizer = adamw(model)
        train(model, optimizer, steps=1)
        change(model)
        refuses(optimizer, model, RuntimeError, REPLACED)


def test_adafactor_over_values_is_refused_and_over_the_dense_rest_is_not():
    model = compact_model()
    adafactor = torch.optim.Adafactor
    refuses(adafactor(model.parameters()), model, TypeError, "Adafactor works on matrices")
    masked = sparse_comm.masks_of(model)
    rest = [p for name, p in model.named_parameters() if name not in masked]
    train(model, adafactor(rest), steps=1)
    late = adafactor(rest)
    train(model, late, steps=1)
    late.add_param_group({"params": [dict(model.named_parameters())["0.weight"]]})
    refuses(late, model, TypeError, "Adafactor works on matrices")


def test_muon_over_values_is_refused():
    model = compact_model()
    with pytest.raises(ValueError, match="2D"):  # by torch: to it, values are vectors
        torch.optim.Muon(model.parameters())
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters())
    with pytest.raises(TypeError, match=r"Muon works on matrices.*cannot orthogonalise"):
        sparse_comm.compact(model, {"0.weight": torch.eye(4).bool()}, optimizer=optimizer)
    assert not sparse_comm.is_compact(model)


# ---------------------------------------------------------------- weight decay


def by_dimensions(model: nn.Module) -> torch.optim.Optimizer:
    """As nanoGPT and timm group parameters."""
    parameters = list(model.parameters())
    decay = {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1}
    return torch.optim.AdamW(
        [decay, {"params": [p for p in parameters if p.dim() < 2]}], 1e-2, weight_decay=0
    )


def warnings_of(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, steps=steps)
    return [str(w.message) for w in caught]


def test_matrices_among_the_undecayed_are_reported_once():
    model = mlp()
    masks = random_masks(model)
    del masks["4.weight"]  # stays a matrix, and decays
    sparse_comm.compact(model, masks)
    (message,) = warnings_of(model, by_dimensions(model))
    assert "not the matrix '0.weight'" in message
    assert "sparse_comm.param_groups(model, weight_decay)" in message


def test_nothing_is_reported_where_decay_is_as_it_should_be():
    groups = sparse_comm.param_groups
    plain, none, all_, ours = mlp(), compact_model(), compact_model(), compact_model()
    assert warnings_of(plain, by_dimensions(plain)) == []
    assert warnings_of(none, torch.optim.SGD(none.parameters(), 0.1)) == []
    assert warnings_of(all_, adamw(all_, weight_decay=0.1)) == []
    assert warnings_of(ours, torch.optim.AdamW(groups(ours, 0.1), 1e-2, weight_decay=0)) == []


@both_modes
def test_param_groups_decay_as_the_usual_groups_of_the_dense_model(weights):
    dense, compact, masks = pair(weights=weights)
    ours = torch.optim.AdamW(sparse_comm.param_groups(compact, 0.1), 1e-2)
    assert train(compact, ours, steps=10) == train(dense, by_dimensions(dense), masks, 10)
    assert same_state(sparse_comm.dense_state_dict(compact), dense.state_dict())
    assert pruned_are_zero(compact)


@both_modes
def test_the_step_of_another_models_optimizer_leaves_graphs_that_are_still_to_be_used(weights):
    generator, critic = compact_model(weights=weights), mlp()
    x, _ = batch(0)
    first = generator(x).sum()
    with_gradients(critic)
    adamw(critic).step()
    (first + generator(x).sum()).backward()


def test_values_in_a_flat_buffer_are_seen_after_a_step_for_copies_of_it():
    """As ZeRO keeps them, and its optimizer."""
    model = compact_model()
    values = dict(model.named_parameters())["0.weight"]
    flat = torch.cat([values.detach(), torch.zeros(4)])
    values.data = flat[:-4]
    before = model[0].weight.detach().clone()
    master = nn.Parameter(flat.clone())
    master.grad = torch.ones_like(master)
    optimizer = torch.optim.SGD([master], lr=0.5)
    optimizer.step()
    flat.data.copy_(master.detach())
    mask = sparse_comm.masks_of(model)["0.weight"]
    assert torch.equal(model[0].weight.detach(), before - 0.5 * mask)


def test_wider_masters_count_among_narrower_tensors_of_their_shape():
    model = compact_model().bfloat16()
    values = dict(model.named_parameters())["0.weight"]
    before = model[0].weight.detach().clone()
    master = nn.Parameter(values.detach().float())
    other = nn.Parameter(torch.zeros_like(values))
    for parameter in (master, other):
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([master, other], lr=0.5).step()
    values.data.copy_(master.detach())
    assert not torch.equal(model[0].weight.detach(), before)
