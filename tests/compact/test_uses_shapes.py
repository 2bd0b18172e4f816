"""Shapes and masks at the edge, layouts and dtypes: ordinary days."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.compact.uses import (
    MODES,
    linear,
    mask_like,
    noise,
    pair,
    trains,
)

pytestmark = MODES


# ---------------------------------------------------------------- shapes and masks


class Scaled(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum() + x.sum()


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (1, 1, 1), (2, 3, 2, 2, 2, 2)])
@pytest.mark.parametrize("kept", [True, False])
def test_parameters_of_any_shape_full_and_empty(weights, shape, kept):
    masks = {"weight": torch.full(shape, kept)}
    both = pair(lambda: Scaled(*shape), weights, noise(1).requires_grad_(), masks=masks)
    trains(both)
    both.use(lambda m: m.weight.data.fill_(2))
    both.use(lambda m: m.double())
    both.use(lambda m: m.float())
    both.compact = copy.deepcopy(both.compact)
    both.check()
    assert both.values().shape == (torch.Size(shape).numel() if kept else 0,)


@pytest.mark.parametrize("kept", [True, False])
def test_full_and_empty_masks_of_a_layer(weights, kept):
    both = linear(weights, masks={"weight": torch.full((5, 6), kept)})
    trains(both)
    both.use(lambda m: m.reset_parameters())
    both.check()
    assert both.values().numel() == (30 if kept else 0)


def test_a_pruned_bias_stays_zero(weights):
    masks = {"weight": mask_like(noise(5, 6)), "bias": noise(5) > 0}
    both = linear(weights, masks=masks)
    trains(both)
    both.use(lambda m: m.bias.data.fill_(1))
    both.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinite_gradients_reach_unpruned_entries_only(weights, value):
    both = linear(weights)
    x = noise(3, 6)
    x[0, 1] = value
    optimizer = torch.optim.SGD(both.compact.parameters(), lr=0.1)
    both.compact(x).sum().backward()
    mask = both.masks["weight"]
    grad = both.compact.weight.grad
    assert not grad[~mask].any()
    assert not grad[:, 1][mask[:, 1]].isfinite().any()
    assert grad[:, [0, 2, 3, 4, 5]].isfinite().all()
    optimizer.step()
    weight = both.compact.weight.detach()
    assert not weight[~mask].any()
    assert not weight[:, 1][mask[:, 1]].isfinite().any()


# ---------------------------------------------------------------- layouts and dtypes


@pytest.mark.parametrize("when", ["before", "after"])
def test_channels_last_is_kept(weights, when):
    def make() -> nn.Module:
        conv = nn.Conv2d(4, 8, 3)
        return conv.to(memory_format=torch.channels_last) if when == "before" else conv

    both = pair(make, weights, noise(2, 4, 5, 5).to(memory_format=torch.channels_last))
    if when == "after":
        both.use(lambda m: m.to(memory_format=torch.channels_last))
    assert both.compact.weight.is_contiguous(memory_format=torch.channels_last)
    trains(both)
    both.use(lambda m: m.weight.data[1].mul_(2))
    both.use(lambda m: nn.init.normal_(m.weight))
    both.check()
    both.compact = copy.deepcopy(both.compact)
    both.use(lambda m: m.double())
    both.use(lambda m: m.float())
    assert both.compact.weight.is_contiguous(memory_format=torch.channels_last)
    both.check()
    both.use(lambda m: m.to(memory_format=torch.contiguous_format))
    assert both.compact.weight.is_contiguous()
    both.check()


def test_channels_last_3d_is_kept(weights):
    both = pair(lambda: nn.Conv3d(2, 3, 2), weights, noise(1, 2, 3, 3, 3))
    both.use(lambda m: m.to(memory_format=torch.channels_last_3d))
    assert both.compact.weight.is_contiguous(memory_format=torch.channels_last_3d)
    both.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_there_and_back_are_those_of_the_dense_module(weights, dtype):
    both = linear(weights)
    both.use(lambda m: m.to(dtype))
    assert both.compact.weight.dtype == both.values().dtype == dtype
    both.check(noise(3, 6).to(dtype))
    both.use(lambda m: m.float())
    both.check()
    both.use(lambda m: m.half())
    both.use(lambda m: m.bfloat16())
    both.use(lambda m: m.float())
    trains(both)
