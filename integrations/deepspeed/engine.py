"""What an engine with compact parameters does besides: caches are told when values were written.

DeepSpeed writes parameters through ``.data`` and through flat buffers that they are views of, which
no tensor's version shows. Hooks of its optimizers would not do: ZeRO may put another optimizer in
the place of the one that it was given (Adagrad). So the engine's own public methods tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.torch_autocast import get_comm_dtype
from torch import Tensor

from sparse_comm import values_changed
from sparse_comm.compact.convert import is_compact

from ..report import FirstStep
from .load import Checkpoints
from .partitioned import drop_caches
from .pipeline import share_values
from .refuse import check_version

__all__ = ["follow", "gradient_bytes", "watch"]

Engine = Any  # DeepSpeedEngine, which has no types


def watch(engine: Engine) -> Engine:
    """Make an engine fit for the compact model inside it.

    ``initialize`` does this. Call it by hand on what ``deepspeed.initialize`` gave for a model
    that was compact already.

    Args:
        engine: of ``deepspeed.initialize``. Its class becomes a subclass of what it was.

    Returns:
        The same engine.

    Raises:
        ValueError: its model is not compact.
        RuntimeError: a DeepSpeed that this is not tested with.

    Source: ours.
    """
    check_version()
    parts = engine.pipeline_parallelism or engine.has_moe_layers  # this rank's may have no mask
    if not is_compact(engine.module) and not parts:
        raise ValueError(
            "the engine's model is not compact: call sparse_comm.compact(model, masks) before "
            "deepspeed.initialize, or use initialize of this module, which does both"
        )
    return follow(engine)


def follow(engine: Engine) -> Engine:
    """``watch``, of an engine that is known to be fit for it."""
    if isinstance(engine, CompactEngine):
        return engine
    model = engine.module
    if engine.zero_optimization_partition_weights():
        drop_caches(model)
    share_values(model)
    values_changed(model)  # the engine has broadcast and cast them
    object.__setattr__(engine, "__class__", _engine_class(type(engine)))
    engine.__dict__["_sparse_comm_first_step"] = FirstStep(model, _wire_dtype(engine))
    return engine


def gradient_bytes(engine: Engine) -> dict[str, int] | None:
    """Bytes of gradients that one backward pass of this rank handed to the reduction.

    Args:
        engine: of ``initialize``.

    Returns:
        ``{"dense": …, "sent": …}``: of the dense parameters, and as they are; in the dtype in
        which DeepSpeed communicates. None before the first step.

    Source: ours.
    """
    first: FirstStep | None = engine.__dict__.get("_sparse_comm_first_step")
    return None if first is None else first.figures()


class CompactEngine(Checkpoints, DeepSpeedEngine):
    """Mixed into the class of an engine whose model has compact parameters."""

    def step(self, *args: Any, **kwargs: Any) -> None:
        """As DeepSpeed's."""
        super().step(*args, **kwargs)
        if self.was_step_applied():  # not within an accumulation, nor after an overflow
            self._stepped()

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, of pipelines."""
        loss = super().train_batch(*args, **kwargs)
        self._stepped()
        return loss

    def _stepped(self) -> None:
        values_changed(self.module)
        figures = self.__dict__["_sparse_comm_first_step"].end()
        if figures is None or self.global_rank != 0:
            return
        # Not by DeepSpeed's logger, which shows nothing below warnings unless told to.
        print(FirstStep.text(figures), flush=True)
        if self.monitor.enabled:
            at = self.global_samples
            events = [(f"Train/sparse_comm/{k}_bytes", v, at) for k, v in figures.items()]
            self.monitor.write_events(events)


_classes: dict[type, type[CompactEngine]] = {}


def _engine_class(base: type) -> type[CompactEngine]:
    if base not in _classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base] = type(base.__name__, (CompactEngine, base), names)
    return _classes[base]


def _wire_dtype(engine: Engine) -> Callable[[Tensor], torch.dtype]:
    """What the gradient of a parameter travels in."""
    if engine.torch_autocast_enabled() and engine.zero_optimization():
        return get_comm_dtype
    dtype: torch.dtype = engine.communication_data_type
    return lambda parameter: dtype
