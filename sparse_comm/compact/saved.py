"""Transient weights: autograd saves values and pattern, and expands again in backward.

Operators save the weight they multiply by, which would keep every dense weight of the model alive
from forward to backward. Hooks around each operator that reads a transient weight store a recipe
for it instead. Hooks that were active already (activation checkpointing, offloading) go on to see
every other tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparse_comm.compact.slot import Slot

__all__ = ["expand_again_in_backward"]


class _Recipe:
    """How to make a saved tensor again: expand, cast, and take a view."""

    __slots__ = ("dense_dtype", "dtype", "pattern", "slot", "values", "version", "view")

    def __init__(self, slot: Slot, values: Tensor, base: Tensor, saved: Tensor) -> None:
        self.slot, self.pattern = slot, slot.pattern
        # The parameter itself: a sharding framework may give it other memory in backward.
        self.values = values if isinstance(values, torch.nn.Parameter) else values.detach()
        self.version = values._version
        self.dense_dtype, self.dtype = base.dtype, saved.dtype
        self.view = (saved.size(), saved.stride(), saved.storage_offset())

    def make(self) -> Tensor:
        if self.values._version != self.version or self.slot.pattern is not self.pattern:
            raise RuntimeError(
                f"the values of compact parameter {self.slot.name!r} changed between forward and "
                "backward (optimizer step, load_state_dict or another in-place write); a "
                "transient weight is expanded again in backward and needs them as they were: run "
                "backward first"
            )
        with torch.no_grad():
            dense = self.slot.expand(self.values.detach(), self.dense_dtype)
            return dense.to(self.dtype).as_strided(*self.view)


class _Dense:
    """A live dense weight, held weakly: hooks outlive it in the graph."""

    __slots__ = ("base", "slot", "storage", "values")

    def __init__(self, slot: Slot, values: Tensor, base: Tensor) -> None:
        self.slot, self.values, self.base = slot, values, weakref.ref(base)
        self.storage = base.untyped_storage()._cdata

    def is_behind(self, saved: Tensor) -> bool:
        """Whether ``saved`` is a view of this weight, or of its copy in autocast's dtype."""
        storage = saved.untyped_storage()
        if storage._cdata == self.storage:
            return True
        base = self.base()
        if base is None or saved.dtype == base.dtype or storage.nbytes() == 0:
            return False
        if storage.nbytes() != base.numel() * saved.element_size():
            return False
        cast = saved.as_strided(base.size(), base.stride(), 0)
        return torch.equal(cast, base.detach().to(saved.dtype))


def expand_again_in_backward(weights: Sequence[tuple[Slot, Tensor, Tensor]]) -> Any:
    """Context in which autograd saves recipes for (slot, values, dense weight), not the weight.

    Source: ours; SAMO keeps every dense weight (2 bytes a parameter).
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        # torch.func transforms allow no hooks: the dense weight is saved, as without us.
        return torch.enable_grad()
    weights_ = [_Dense(*weight) for weight in weights]
    outer = torch._C._autograd._top_saved_tensors_default_hooks(False)

    def pack(saved: Tensor) -> Any:
        if saved.layout == torch.strided:
            for weight in weights_:
                if weight.is_behind(saved):
                    base = weight.base()
                    assert base is not None
                    return _Recipe(weight.slot, weight.values, base, saved)
        return outer[0](saved) if outer else saved

    return saved_tensors_hooks(pack, _unpack if outer is None else _unpack_with(outer[1]))


def _unpack(saved: Any) -> Tensor:
    return saved.make() if isinstance(saved, _Recipe) else saved


def _unpack_with(outer: Any) -> Any:
    return lambda saved: saved.make() if isinstance(saved, _Recipe) else outer(saved)
