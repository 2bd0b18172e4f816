"""Transient weights live while their layer runs; the gradients of dense weights no longer either.

Bytes are those of the storages that are alive, as operators make them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparse_comm
from tests.compact.models import batch, pair

LAYERS, WIDTH = 8, 256
DENSE = 4 * WIDTH * WIDTH  # bytes of a layer's dense weight; activations are far smaller

both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])


class Live(TorchDispatchMode):
    """Counts the storages of at least ``least`` bytes that operators make while it is on."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.peak = least, 0
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = {storage._cdata for storage in storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage.nbytes() >= self.least and storage._cdata not in there:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self) -> int:
        """Of those that are alive."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


def storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def deep(weights: str, density: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    model = nn.Sequential(*layers)
    masks = {n: torch.rand(p.shape) < density for n, p in model.named_parameters() if p.dim() > 1}
    return sparse_comm.compact(model, masks, weights=weights)  # type: ignore[arg-type]


def checkpointed(model: nn.Sequential, x: Tensor) -> Tensor:
    for i in range(0, len(model), 4):
        x = checkpoint(model[i : i + 4], x, use_reentrant=False)
    return x


def offloaded(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return model(x)


def autocast(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()


def plain(model: nn.Sequential, x: Tensor) -> Tensor:
    return model(x)


FORWARDS: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "eager": plain,
    "autocast": autocast,
    "checkpoint": checkpointed,
    "save_on_cpu": offloaded,
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_no_transient_weight_outlives_its_layer(forward):
    """The peak: the weight, its gradient or its copy in another dtype, and one operand more."""
    model = deep("transient")
    x = torch.randn(4, WIDTH, requires_grad=True)
    with Live(DENSE // 2) as live:
        out = FORWARDS[forward](model, x)
        assert live.bytes() == 0
        assert DENSE <= live.peak <= 2 * DENSE
        out.sum().backward()
        assert live.bytes() == 0
        assert live.peak <= 3 * DENSE
    assert len(live.made) >= 1


def test_the_test_sees_what_other_ways_keep():
    """The same count for what transient weights avoid: expanding in plain sight of autograd."""
    model = deep("transient")
    x = torch.randn(4, WIDTH, requires_grad=True)
    with Live(DENSE // 2) as live:
        for layer in model[::2]:
            x = F.linear(x, torch.clone(layer.weight), layer.bias)
        assert live.bytes() == LAYERS * DENSE


@both_modes
def test_the_dense_gradient_of_a_layer_is_gone_before_the_next_ones_is_made(weights):
    model = deep(weights)
    x = torch.randn(4, WIDTH, requires_grad=True)
    model(x).sum().backward()  # cached weights are made now
    out = model(x).sum()
    with Live(DENSE // 2) as live:
        out.backward()
    # cached: the gradient alone; transient: the weight that the input's gradient needs, too
    assert live.peak <= (DENSE if weights == "cached" else 2 * DENSE)
    assert live.bytes() == 0


def test_a_cached_forward_makes_nothing_dense_as_long_as_values_stay():
    model = deep("cached")
    x = torch.randn(4, WIDTH)
    model(x)
    with Live(DENSE // 2) as live:
        model(x)
    assert live.peak == 0


@both_modes
def test_gradients_are_the_same_whatever_saves_and_recomputes(weights):
    """autocast aside, which rounds."""
    model = deep(weights)
    x = torch.randn(4, WIDTH, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    for forward in (checkpointed, offloaded):
        found = torch.autograd.grad(forward(model, x).square().sum(), [x, *model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------- changes before backward


def step(model: nn.Module, values: list[nn.Parameter], **options: Any) -> None:
    for p in values:
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(values, 1e-2, **options).step()


def loaded(model: nn.Module, values: list[nn.Parameter]) -> None:
    state = model.state_dict()
    model.load_state_dict({k: v * 2 if v.dtype.is_floating_point else v for k, v in state.items()})


def unseen(model: nn.Module, values: list[nn.Parameter]) -> None:
    for p in values:
        p.data.mul_(2)
    sparse_comm.values_changed(model)


CHANGES: dict[str, Callable[[nn.Module, list[nn.Parameter]], None]] = {
    "an optimizer step": step,
    "a foreach step": lambda m, v: step(m, v, foreach=True),
    "a fused step": lambda m, v: step(m, v, fused=True),
    "load_state_dict": loaded,
    "a write through .data and values_changed": unseen,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("forward_again", [False, True])
def test_values_that_changed_before_backward_raise_in_transient_mode(change, forward_again):
    _, model, masks = pair(weights="transient")
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    CHANGES[change](model, [p for n, p in model.named_parameters() if n in masks])
    if forward_again:
        model(x)
    with pytest.raises(RuntimeError, match=r"changed between forward and backward|modified by an"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("forward_again", [False, True])
def test_in_cached_mode_they_raise_or_the_gradient_is_that_of_the_forward(
    change, forward_again, compiled
):
    """A dense weight would raise. The cache still is what forward used, until the next forward."""
    _, model, masks = pair(weights="cached")
    x, y = batch(0)
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    values = [p for n, p in model.named_parameters() if n in masks]
    expected = torch.autograd.grad(F.cross_entropy(forward(x), y), values)
    loss = F.cross_entropy(forward(x), y)
    CHANGES[change](model, values)
    if forward_again:
        forward(x)
    with contextlib.suppress(RuntimeError):
        found = torch.autograd.grad(loss, values)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert compiled or not forward_again
