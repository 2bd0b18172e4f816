"""The first step's report: bytes of gradients, counted as autograd hands them over."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.torch_autocast import get_comm_dtype
from torch import Tensor

from sparse_comm.compact.module import compact_slots

__all__ = ["FirstStep"]


class FirstStep:
    """Counts the gradients of the first step and says what it counted, on rank 0.

    A model that trains dense, by whatever mistake, shows here: its gradients are dense.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._done = False
        dense = {
            id(module._parameters[name]): slot.pattern.numel
            for _, module, name, slot in compact_slots(engine.module)
        }
        self._sent: dict[int, int] = {}  # bytes, by parameter
        self._dense: dict[int, int] = {}
        self._hooks: list[Any] = [
            parameter.register_hook(self._counter(parameter, dense.get(id(parameter))))
            for parameter in engine.module.parameters()
            if parameter.requires_grad
        ]

    def figures(self) -> dict[str, int] | None:
        """Bytes, once the first step is done."""
        if not self._done:
            return None
        return {"dense": sum(self._dense.values()), "sent": sum(self._sent.values())}

    def _counter(self, parameter: Tensor, dense: int | None) -> Any:
        key = id(parameter)
        dtype = self._engine.communication_data_type
        if self._engine.torch_autocast_enabled() and self._engine.zero_optimization():
            dtype = get_comm_dtype(parameter)

        def count(gradient: Tensor) -> None:
            self._sent[key] = gradient.numel() * dtype.itemsize
            self._dense[key] = (gradient.numel() if dense is None else dense) * dtype.itemsize

        return count

    def say(self) -> None:
        """Print the figures after the first step, and give them to the engine's monitor."""
        if self._done:
            return
        self._done = True
        for hook in self._hooks:
            hook.remove()
        figures = self.figures()
        if self._engine.global_rank != 0 or figures is None:
            return
        share = figures["sent"] / max(figures["dense"], 1)
        # Not by DeepSpeed's logger, which shows nothing below warnings unless told to.
        print(
            f"sparse_comm: a backward pass of rank 0 reduces {figures['sent'] / 1e6:.2f} MB of "
            f"gradients, {share:.1%} of {figures['dense'] / 1e6:.2f} MB dense",
            flush=True,
        )
        if self._engine.monitor.enabled:
            at = self._engine.global_samples
            events = [(f"Train/sparse_comm/{k}_bytes", v, at) for k, v in figures.items()]
            self._engine.monitor.write_events(events)
