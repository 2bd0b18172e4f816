"""``torch.func``, forward mode and second derivatives on compact modules."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from tests.compact.uses import (
    MODES,
    linear,
    mlp,
    noise,
    pair,
    same,
)

pytestmark = MODES


def loss_of(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x,)).square().sum()


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_functional_call_takes_values_dense_tensors_and_parameters(weights):
    both = linear(weights)
    x = noise(3, 6)
    mask = both.masks["weight"]
    doubled = {name: p * 2 for name, p in detached(both.compact).items()}
    dense = {name: p * 2 for name, p in detached(both.dense).items()}
    expected = functional_call(both.dense, dense, (x,))
    unmasked = {**dense, "weight": dense["weight"] + (~mask).float()}
    for tensors in (doubled, dense, unmasked):
        same(functional_call(both.compact, tensors, (x,)), expected)
        as_parameters = {name: nn.Parameter(t) for name, t in tensors.items()}
        same(functional_call(both.compact, as_parameters, (x,)), expected)
    both.check()  # the cache still holds the module's own weight


def test_functional_call_is_differentiable(weights):
    both = linear(weights)
    x = noise(3, 6)
    grads = []
    for module in (both.compact, both.dense):
        tensors = {name: p.requires_grad_() for name, p in detached(module).items()}
        loss_of(module, tensors, x).backward()
        grads.append(tensors["weight"].grad)
    same(grads[0], grads[1][both.masks["weight"]])
    assert both.values().grad is None
    both.check()


def test_gradients_per_sample_work(weights):
    both = pair(mlp, weights, noise(3, 6))
    x = noise(4, 6)
    per_sample = [
        vmap(grad(lambda p, x, m=module: loss_of(m, p, x)), in_dims=(None, 0))(detached(module), x)
        for module in (both.compact, both.dense)
    ]
    for name, theirs in per_sample[1].items():
        if name in both.masks:
            theirs = theirs[:, both.masks[name]]
        same(per_sample[0][name], theirs, exact=False)
    both.check()


def test_ensembles_of_values_work(weights):
    both = linear(weights)
    x = noise(3, 6)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in detached(both.compact).items()}
    out = vmap(lambda p: functional_call(both.compact, p, (x,)))(stacked)
    same(out, torch.stack([both.dense(x), 2 * both.dense(x)]), exact=False)
    both.check()


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_jacobians(weights, transform):
    both = pair(mlp, weights, noise(3, 6))
    results = []
    for module in (both.compact, both.dense):
        parameters, x = detached(module), noise(2, 6)

        def function(weight: Tensor, module=module, parameters=parameters, x=x) -> Tensor:
            out = functional_call(module, {**parameters, "0.weight": weight}, (x,))
            return out if transform is not hessian else out.square().sum()

        results.append(transform(function)(parameters["0.weight"]))
    mask = both.masks["0.weight"]
    expected = results[1][..., mask]
    if transform is hessian:
        expected = results[1][mask][:, mask]
    same(results[0], expected, exact=False)
    both.check()


def test_forward_mode_differentiation(weights):
    both = linear(weights)
    mask = both.masks["weight"]
    x, towards = noise(3, 6), noise(5, 6, seed=2)
    tangents = {"weight": towards[mask], "bias": noise(5)}
    dense_tangents = {"weight": towards * mask, "bias": noise(5)}
    results = []
    for module, along in ((both.compact, tangents), (both.dense, dense_tangents)):
        with fwAD.dual_level():
            duals = {n: fwAD.make_dual(p, along[n]) for n, p in detached(module).items()}
            out = functional_call(module, duals, (x,))
            results.append(fwAD.unpack_dual(out).tangent)
            through_x = module(fwAD.make_dual(x, noise(3, 6, seed=4)))
            results.append(fwAD.unpack_dual(through_x).tangent)
    same(results[0], results[2])
    same(results[1], results[3])
    both.check()


def test_double_backward_gives_the_gradient_penalty(weights):
    both = pair(mlp, weights, noise(3, 6))

    def penalty(module: nn.Module) -> None:
        x = noise(3, 6).requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (slope.norm(dim=1) - 1).square().sum().backward()

    both.use(penalty)
    both.check_gradients()
    both.each(lambda m: m.zero_grad())

    def of_the_values(module: nn.Module) -> None:
        loss = module(noise(3, 6)).square().sum()
        grads = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        if module is both.dense:
            masks = [both.masks.get(name) for name, _ in module.named_parameters()]
            grads = [g if m is None else g * m for g, m in zip(grads, masks, strict=True)]
        sum(g.square().sum() for g in grads).backward()

    both.use(of_the_values)
    both.check_gradients(exact=False)
