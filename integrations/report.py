"""The first step's report: bytes of gradients, counted as autograd hands them over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.module import compact_slots

__all__ = ["FirstStep"]


class FirstStep:
    """Counts the gradients of one step's backward passes, and says what it counted.

    A model that trains dense, by whatever mistake, shows here: its gradients are dense.

    Args:
        model: compact, or wrapped.
        dtype_of: what the gradient of a parameter travels in.
    """

    def __init__(self, model: nn.Module, dtype_of: Callable[[Tensor], torch.dtype]) -> None:
        self._done = False
        dense = {
            id(module._parameters[name]): slot.pattern.numel
            for _, module, name, slot in compact_slots(model)
        }
        self._sent: dict[int, int] = {}  # bytes, by parameter
        self._dense: dict[int, int] = {}
        self._hooks: list[Any] = [
            parameter.register_hook(
                self._counter(id(parameter), dtype_of(parameter), dense.get(id(parameter)))
            )
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def end(self) -> dict[str, int] | None:
        """Bytes, the first time that it is called; then None."""
        if self._done:
            return None
        self._done = True
        for hook in self._hooks:
            hook.remove()
        return self.figures()

    def figures(self) -> dict[str, int] | None:
        """Bytes, once the first step has ended: ``{"dense": …, "sent": …}``."""
        if not self._done:
            return None
        return {"dense": sum(self._dense.values()), "sent": sum(self._sent.values())}

    @staticmethod
    def text(figures: dict[str, int]) -> str:
        """A line for people."""
        sent, dense = figures["sent"], figures["dense"]
        return (
            f"sparse_comm: a backward pass of rank 0 reduces {sent / 1e6:.2f} MB of gradients, "
            f"{sent / max(dense, 1):.1%} of {dense / 1e6:.2f} MB dense"
        )

    def _counter(self, key: int, dtype: torch.dtype, dense: int | None) -> Callable[[Tensor], None]:
        def count(gradient: Tensor) -> None:
            self._sent[key] = gradient.numel() * dtype.itemsize
            self._dense[key] = (gradient.numel() if dense is None else dense) * dtype.itemsize

        return count
