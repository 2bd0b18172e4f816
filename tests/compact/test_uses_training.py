"""What training scripts do around a model: clipping, autocast, checkpointing, averaging."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.compact.uses import (
    MODES,
    Pair,
    linear,
    mask_,
    mlp,
    noise,
    pair,
    same,
)

pytestmark = MODES


@pytest.mark.parametrize("foreach", [True, False])
def test_clip_grad_norm_works(weights, foreach):
    both = pair(mlp, weights, noise(3, 6))

    def clip(module: nn.Module) -> Tensor:
        module(noise(3, 6)).square().sum().backward()
        if module is both.dense:
            for name, mask in both.masks.items():
                module.get_parameter(name).grad.masked_fill_(~mask, 0)
        return nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=foreach)

    same(*both.use(clip), exact=False)
    both.check_gradients(exact=False)
    total = nn.utils.get_total_norm([p.grad for p in both.compact.parameters()])
    assert total == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("foreach", [True, False])
def test_clip_grad_value_works(weights, foreach):
    both = pair(mlp, weights, noise(3, 6))
    both.use(lambda m: m(noise(3, 6)).square().sum().backward())
    both.use(lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.2, foreach=foreach))
    both.check_gradients()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_autocast_works(weights, compute_dtype):
    both = pair(mlp, weights, noise(3, 6), compute_dtype=compute_dtype)

    def step(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(noise(3, 6))
        out.float().square().sum().backward()
        return out

    same(*both.each(step))
    both.check_gradients()
    assert both.values("0.weight").grad.dtype == torch.float32


def test_the_gradient_scaler_works(weights):
    both = pair(mlp, weights, noise(3, 6))

    def train(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for x in (noise(3, 6), noise(3, 6) * float("inf"), noise(3, 6, seed=1)):
            scaler.scale(module(x).square().sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            mask_(module, both.masks)

    both.each(train)
    both.check()


def test_without_autocast_a_compute_dtype_error_says_what_to_do(weights):
    both = linear(weights, compute_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as caught:
        both.compact(noise(3, 6))
    assert "'weight' has compute_dtype torch.bfloat16" in str(caught.value)
    assert "torch.autocast" in str(caught.value)
    out = nn.functional.linear(noise(3, 6).bfloat16(), both.compact.weight)
    same(out, nn.functional.linear(noise(3, 6).bfloat16(), both.dense.weight.bfloat16()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_works(weights, reentrant):
    both = pair(mlp, weights, noise(3, 6))

    def train(module: nn.Module) -> None:
        x = noise(3, 6).requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        checkpoint_sequential(module, 2, x, use_reentrant=reentrant).sum().backward()

    both.use(train)
    both.check_gradients()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_offloading_of_saved_tensors_works(weights, compute_dtype):
    both = pair(mlp, weights, noise(3, 6), compute_dtype=compute_dtype)

    def train(module: nn.Module) -> None:
        with (
            torch.autograd.graph.save_on_cpu(),
            torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype is not None),
        ):
            out = module(noise(3, 6))
        out.float().square().sum().backward()

    both.use(train)
    both.check_gradients()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_offloading_works(weights, reentrant):
    both = pair(mlp, weights, noise(3, 6))

    def train(module: nn.Module) -> None:
        x = noise(3, 6).requires_grad_()
        with torch.autograd.graph.save_on_cpu():
            out = checkpoint(module, x, use_reentrant=reentrant)
        out.square().sum().backward()

    both.use(train)
    both.check_gradients()


def test_backward_to_given_parameters_works(weights):
    both = pair(mlp, weights, noise(3, 6))
    both.use(lambda m: m(noise(3, 6)).sum().backward(inputs=[*m[0].parameters()]))
    both.check_gradients()
    assert both.values("2.weight").grad is None


def test_saved_tensor_hooks_of_the_user_see_the_activations(weights):
    both = pair(mlp, weights, noise(3, 6))
    shapes: list[list[tuple[int, ...]]] = []

    def train(module: nn.Module) -> None:
        seen: list[tuple[int, ...]] = []
        shapes.append(seen)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            module(noise(3, 6)).square().sum().backward()

    both.use(train)
    both.check_gradients()
    activations = [s for s in shapes[1] if 3 in s]
    assert [s for s in shapes[0] if 3 in s] == activations
    if weights == "transient":
        assert shapes[0] == activations  # and no dense weight


def test_averaged_models_work(weights):
    both = pair(mlp, weights, noise(3, 6))

    def average(module: nn.Module) -> AveragedModel:
        ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        mean = AveragedModel(module)
        for factor in (3.0, -2.0):
            with torch.no_grad():
                module[0].weight.mul_(factor)
                module[2].bias.add_(factor)
            ema.update_parameters(module)
            mean.update_parameters(module)
        return nn.ModuleList([ema.module, mean.module])

    ours, theirs = both.use(average)
    masks = {f"{i}.{name}": mask for i in (0, 1) for name, mask in both.masks.items()}
    for i in (0, 1):
        Pair(ours[i], theirs[i], both.masks, both.inputs).check()
    Pair(ours, theirs, masks, ()).check_weights()
    both.check()
