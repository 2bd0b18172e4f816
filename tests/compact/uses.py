"""What the tests of uses share: a compact module beside the masked dense one that it must equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sparse_comm

__all__ = [
    "MODES",
    "Pair",
    "linear",
    "mask_",
    "mask_like",
    "mlp",
    "noise",
    "pair",
    "refused",
    "same",
    "trains",
]

MODES = pytest.mark.parametrize("weights", ["cached", "transient"])


@dataclass
class Pair:
    """A compact module and the dense module of the same weights, zero where pruned."""

    compact: Any
    dense: Any
    masks: dict[str, Tensor]
    inputs: tuple[Any, ...]

    def each(self, use: Callable[[Any], Any]) -> tuple[Any, Any]:
        """What ``use`` returns for each module, from the same random numbers."""
        results = []
        for module in (self.compact, self.dense):
            torch.manual_seed(1)
            results.append(use(module))
        return results[0], results[1]

    def use(self, use: Callable[[Any], Any]) -> tuple[Any, Any]:
        """As ``each``, for what writes: afterwards the dense module is masked again."""
        results = self.each(use)
        mask_(self.dense, self.masks)
        return results

    def values(self, name: str = "weight") -> nn.Parameter:
        return dict(self.compact.named_parameters())[name]

    def check(self, *inputs: Any, exact: bool = True) -> None:
        """The compact module holds, computes and learns what the masked dense one does."""
        self.check_weights()
        inputs = inputs or self.inputs
        with torch.no_grad():
            same(*self.each(lambda m: m(*inputs)), exact)
        self.each(lambda m: m.zero_grad())
        outs = self.each(lambda m: m(*inputs))
        same(*outs, exact)
        for out in outs:
            loss = sum((leaf * noise(*leaf.shape).to(leaf.dtype)).sum() for leaf in floats(out))
            if loss.requires_grad:
                loss.backward()
        self.check_gradients(exact)
        self.each(lambda m: m.zero_grad())

    def check_weights(self) -> None:
        """Both hold the same dense weights, zero where pruned, under the same names."""
        ours, theirs = sparse_comm.dense_state_dict(self.compact), self.dense.state_dict()
        assert list(ours) == list(theirs)
        assert ours._metadata.keys() == theirs._metadata.keys()
        for name, tensor in theirs.items():
            same(ours[name], tensor)
        for name, mask in self.masks.items():
            same(self.compact.get_parameter(name).detach(), self.dense.get_parameter(name).detach())
            assert not self.compact.get_parameter(name).detach()[~mask].any()

    def check_gradients(self, exact: bool = True) -> None:
        """The gradients are those of the dense module, zero where pruned."""
        ours = dict(self.compact.named_parameters())
        for name, parameter in self.dense.named_parameters():
            grad = parameter.grad
            if grad is None:
                assert ours[name].grad is None, name
            elif name in self.masks:
                mask = self.masks[name]
                same(self.compact.get_parameter(name).grad, grad.masked_fill(~mask, 0), exact)
                assert ours[name].grad.shape == (int(mask.sum()),)
            else:
                same(ours[name].grad, grad, exact)


def pair(
    make: Callable[[], nn.Module],
    weights: str,
    *inputs: Any,
    masks: dict[str, Tensor] | None = None,
    **options: Any,
) -> Pair:
    """What ``make`` builds, twice: compact, by default in every matrix, and masked dense."""
    torch.manual_seed(0)
    compact = make()
    torch.manual_seed(0)
    dense = make()
    if masks is None:
        masks = {name: mask_like(p) for name, p in dense.named_parameters() if p.dim() >= 2}
    mask_(dense, masks)
    sparse_comm.compact(compact, masks, weights=weights, **options)
    return Pair(compact, dense, masks, inputs)


def linear(weights: str, **options: Any) -> Pair:
    return pair(lambda: nn.Linear(6, 5), weights, noise(3, 6), **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def mask_like(tensor: Tensor) -> Tensor:
    """About half True; the first entry is kept and the last one pruned."""
    mask = noise(*tensor.shape, seed=7) < 0
    if mask.numel() > 1:
        mask.view(-1)[0], mask.view(-1)[-1] = True, False
    return mask


def mask_(module: nn.Module, masks: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).masked_fill_(~mask, 0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def floats(out: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point())


def same(ours: Any, theirs: Any, exact: bool = True) -> None:
    """Equal, bit for bit if ``exact`` (NaN is NaN, 0 is -0)."""
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor):
            limits = {"rtol": 0.0, "atol": 0.0} if exact else {}
            torch.testing.assert_close(
                a.detach().clone(), b.detach().clone(), equal_nan=True, **limits
            )
        else:
            assert a == b


@contextmanager
def refused(pairs: Pair | list[Pair], error: type[Exception], *words: str) -> Iterator[None]:
    """The block raises ``error`` with these words, and the modules go on as before."""
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    for each in pairs if isinstance(pairs, list) else [pairs]:
        each.check()


def trains(both, *inputs, steps: int = 3) -> None:
    """A few steps of SGD with momentum are the same, bit for bit."""
    inputs = inputs or both.inputs
    for module in (both.compact, both.dense):
        module.train()
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (both.compact, both.dense)
    ]
    for step in range(steps):
        for module, optimizer in zip((both.compact, both.dense), optimizers, strict=True):
            torch.manual_seed(step)
            out = module(*inputs)
            out = out[0] if isinstance(out, tuple) else out
            out.square().mean().backward()
            if module is both.dense:
                for name, mask in both.masks.items():
                    grad = module.get_parameter(name).grad
                    if grad is not None:
                        grad.masked_fill_(~mask, 0)
            optimizer.step()
            optimizer.zero_grad()
    both.check()
