"""What is asked of ``module.weight`` as a parameter: gradient, hooks, copies, notes on it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.compact.uses import (
    MODES,
    linear,
    noise,
    pair,
    refused,
    same,
)

pytestmark = MODES


def train_on(both, *inputs):
    """One forward and backward pass of each module."""
    both.use(lambda m: m(*(inputs or both.inputs)).square().sum().backward())


# ---------------------------------------------------------------- .grad


def test_grad_is_the_dense_gradient_zero_where_pruned(weights):
    both = linear(weights)
    assert both.compact.weight.grad is None
    train_on(both)
    both.check_gradients()
    assert both.compact.weight.grad.shape == (5, 6)


def test_grad_accumulates(weights):
    both = linear(weights)
    train_on(both)
    train_on(both, noise(2, 6, seed=1))
    both.check_gradients()


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.weight.grad.mul_(2),
        lambda m: m.weight.grad.zero_(),
        lambda m: m.weight.grad.data.add_(1),
        lambda m: m.weight.grad.__setitem__(0, 3.0),
        lambda m: setattr(m.weight, "grad", m.weight.grad + 1),
        lambda m: setattr(m.weight, "grad", noise(5, 6)),
        lambda m: torch._foreach_mul_([m.weight.grad, m.bias.grad], 0.5),
        lambda m: nn.utils.clip_grad_value_([m.weight], 0.1),
    ],
)
def test_writes_to_grad_take_effect(weights, write):
    both = linear(weights)
    train_on(both)
    both.use(write)
    both.check_gradients()


def test_grad_can_be_set_before_backward(weights):
    both = linear(weights)
    both.use(lambda m: setattr(m.weight, "grad", noise(5, 6)))
    train_on(both)
    both.check_gradients()


@pytest.mark.parametrize("how", ["assign", "delete", "zero_grad"])
def test_grad_can_be_dropped(weights, how):
    both = linear(weights)
    train_on(both)
    if how == "assign":
        both.compact.weight.grad = None
    elif how == "delete":
        del both.compact.weight.grad
    else:
        both.compact.zero_grad()
    assert both.compact.weight.grad is None
    assert both.values().grad is None
    both.check()


def test_grad_of_a_wrong_shape_raises(weights):
    both = linear(weights)
    with refused(both, ValueError, "'weight'", "(6, 5)", "(5, 6)"):
        both.compact.weight.grad = torch.ones(6, 5)


def test_grad_of_a_part_of_the_weight_raises(weights):
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "module's attribute"):
        both.compact.weight[0].grad = torch.ones(6)


# ---------------------------------------------------------------- hooks


def test_register_hook_sees_and_changes_the_dense_gradient(weights):
    both = linear(weights)
    seen: list[Tensor] = []

    def hook(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad * 2

    handles = both.use(lambda m: m.weight.register_hook(hook))
    train_on(both)
    assert seen[0].shape == (5, 6)
    same(seen[0], seen[1] * both.masks["weight"])
    both.check_gradients()
    for handle in handles:
        handle.remove()
    both.check()
    assert len(seen) == 2


def test_register_hook_that_returns_nothing_changes_nothing(weights):
    both = linear(weights)
    both.use(lambda m: m.weight.register_hook(lambda grad: None))
    both.check()


def test_hooks_of_frozen_weights_raise_as_for_any_parameter(weights):
    both = linear(weights)
    both.use(lambda m: m.requires_grad_(False))
    with refused(both, RuntimeError, "doesn't require gradient"):
        both.compact.weight.register_hook(lambda grad: grad)


def test_post_accumulate_grad_hooks_raise_and_say_where_they_go(weights):
    both = linear(weights)
    called = []
    with refused(both, RuntimeError, "named_parameters())['weight'].register_post"):
        both.compact.weight.register_post_accumulate_grad_hook(lambda p: None)
    values = dict(both.compact.named_parameters())["weight"]
    values.register_post_accumulate_grad_hook(lambda p: called.append(p.grad.shape))
    train_on(both)
    assert called == [(int(both.masks["weight"].sum()),)]


def test_hooks_on_the_output_and_the_module_see_what_they_did(weights):
    both = linear(weights)
    seen: list[Tensor] = []
    both.use(lambda m: m.register_full_backward_hook(lambda _, gi, go: seen.append(go[0])))
    both.use(lambda m: m.register_forward_hook(lambda _, args, out: out * 2))
    train_on(both)
    same(seen[0], seen[1])
    both.check()


# ---------------------------------------------------------------- requires_grad


@pytest.mark.parametrize(
    "freeze",
    [
        lambda m, on: m.weight.requires_grad_(on),
        lambda m, on: setattr(m.weight, "requires_grad", on),
        lambda m, on: m.requires_grad_(on),
        lambda m, on: [p.requires_grad_(on) for p in m.parameters()],
    ],
)
def test_requires_grad_freezes_and_thaws(weights, freeze):
    both = linear(weights)
    both.use(lambda m: freeze(m, False))
    assert not both.compact.weight.requires_grad
    assert not both.values().requires_grad
    assert both.compact(noise(1, 6)).requires_grad == both.dense(noise(1, 6)).requires_grad
    both.check()
    both.use(lambda m: freeze(m, True))
    assert both.compact.weight.requires_grad
    both.check()


def test_a_frozen_weight_passes_gradients_on_to_the_input(weights):
    both = linear(weights)
    both.use(lambda m: m.requires_grad_(False))
    grads = []
    for module in (both.compact, both.dense):
        x = noise(3, 6).requires_grad_()
        module(x).square().sum().backward()
        grads.append(x.grad)
    same(*grads)


def test_requires_grad_of_a_part_of_the_weight_raises(weights):
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "module's attribute"):
        both.compact.weight[0].requires_grad_(False)


def test_autograd_grad_by_the_weight_gives_the_dense_gradient(weights):
    both = linear(weights)

    def grads(module: nn.Module) -> tuple[Tensor, ...]:
        loss = module(noise(3, 6)).tanh().sum()
        return torch.autograd.grad(loss, [module.weight, module.bias])

    def one(module: nn.Module) -> Tensor:
        return torch.autograd.grad(module.weight.square().sum(), module.weight)[0]

    def second(module: nn.Module) -> Tensor:
        loss = module(noise(3, 6)).tanh().sum()
        (grad,) = torch.autograd.grad(loss, module.weight, create_graph=True)
        return torch.autograd.grad((grad * module.weight).sum(), module.weight)[0]

    mask = both.masks["weight"]
    ours, theirs = both.use(grads)
    same(ours, (theirs[0] * mask, theirs[1]))
    ours, theirs = both.use(one)
    same(ours, theirs * mask)
    ours, theirs = both.use(second)
    same(ours, theirs * mask, exact=False)
    both.check()


def test_retain_grad_is_harmless(weights):
    both = linear(weights)
    both.use(lambda m: m.weight.retain_grad())
    both.check()


# ---------------------------------------------------------------- what it is


def test_it_looks_like_the_parameter_it_was(weights):
    weight = linear(weights).compact.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, Tensor)
    assert weight.shape == (5, 6)
    assert weight.dim() == weight.ndim == 2
    assert weight.numel() == 30
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.requires_grad
    assert len(weight) == 5
    assert len(weight.tolist()) == 5
    assert len(list(weight)) == 5
    assert "tensor(" in repr(weight)
    assert str(weight)
    assert f"{weight.sum():.3f}"
    assert not isinstance(weight[0], nn.Parameter)


def test_notes_on_the_parameter_last(weights):
    """Frameworks mark parameters: allreduce, is_expert, tensor_model_parallel, …"""

    def make() -> nn.Module:
        module = nn.Linear(6, 5)
        module.weight.allreduce = False
        return module

    both = pair(make, weights, noise(3, 6))
    assert both.compact.weight.allreduce is False
    assert both.values().allreduce is False
    both.compact.weight.is_expert = True
    assert both.compact.weight.is_expert
    assert both.values().is_expert
    assert not hasattr(both.compact.weight, "absent")
    assert not hasattr(both.compact.weight[0], "is_expert")
    with pytest.raises(AttributeError, match="absent"):
        both.compact.weight.absent  # noqa: B018
    assert copy.deepcopy(both.compact).weight.shape == (5, 6)
    both.check()


def test_get_parameter_and_getattr_give_the_dense_weight(weights):
    both = pair(lambda: nn.Sequential(nn.Linear(6, 5)), weights, noise(3, 6))
    same(both.compact.get_parameter("0.weight"), both.dense.get_parameter("0.weight"))
    same(both.compact[0].weight, both.dense[0].weight)
    assert [n for n, _ in both.compact.named_parameters()] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.LBFGS])
def test_an_optimizer_of_module_weight_raises_and_says_what_to_give_it(weights, optimizer):
    both = linear(weights)
    with refused(both, ValueError, "'weight'", "model.parameters()"):
        optimizer([both.compact.weight], lr=0.1)
    sgd = torch.optim.SGD([both.values()], lr=0.1)
    with refused(both, ValueError, "'weight'", "model.parameters()"):
        sgd.add_param_group({"params": [both.compact.weight]})


def test_nn_parameter_of_the_weight_raises_and_of_a_clone_works(weights):
    both = linear(weights)
    for use in (
        lambda w: nn.Parameter(w),
        lambda w: nn.Parameter(w.data),
        lambda w: nn.Parameter(w.detach(), requires_grad=False),
        lambda w: nn.Buffer(w),
    ):
        with refused(both, (RuntimeError, TypeError), "'weight'", "clone()"):
            use(both.compact.weight)
    new = nn.Parameter(both.compact.weight.detach().clone())
    assert type(new) is nn.Parameter
    same(new, both.dense.weight)


def test_copies_are_plain_tensors_of_their_own(weights):
    both = linear(weights)
    weight = both.compact.weight
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    copies = [
        copy.deepcopy(weight),
        copy.copy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(file),
        weight.clone(),
        weight.detach().clone(),
        weight.double().float(),
        torch.tensor(weight.tolist()),
        weight.cpu().clone(),
    ]
    for each in copies:
        assert type(each) is Tensor
        same(each, both.dense.weight)
        with torch.no_grad():
            each.zero_()
    assert weight.clone().requires_grad
    both.check()
