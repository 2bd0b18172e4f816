"""Sends between the stages of DeepSpeed's pipelines that carry only what the next stage reads.

The schedule stays DeepSpeed's. A stage sends while it goes on, and receives one micro-batch ahead,
where DeepSpeed's own sends and receives wait for each other.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pipeline import (
    Boundary,
    Codec,
    Description,
    Ends,
    TorchWire,
    boundary_between,
    compare,
    cpu_backend,
    describe,
    has_messages,
)

from .refuse import check_version

__all__ = ["is_plain", "pack_sends"]

_TAG = 0x5D0000  # of the first message; DeepSpeed's own have 0

Engine = Any  # PipelineEngine, which has no types


def pack_sends(
    engine: Engine,
    pipeline_codec: str | Codec = "auto",
    *,
    checksum: bool = False,
) -> Engine:
    """Have a pipeline's stages send only what the next one reads. A collective of all ranks.

    ``initialize`` does this, as ``"pipeline_codec"`` of the block says. Call it by hand on a
    pipeline engine that has no compact parameters, and again after ``update_masks``. Losses and
    weights stay those of DeepSpeed's own sends, bit for bit.

    Args:
        engine: a ``PipelineEngine``. Its class becomes a subclass of what it was.
        pipeline_codec: "auto", "channels", "zeros" or "dense" (docs/pipeline.md), or an object
            with the methods of ``sparse_comm.pipeline.Codec``. Channels are those of the masks of
            compact stages.
        checksum: whether messages carry one, at some 0.5 ms a MB.

    Returns:
        The same engine.

    Raises:
        ValueError: on all ranks: an unknown codec; stages with different ones; activations that are
            partitioned over tensor-parallel ranks.
        TypeError: no pipeline engine.

    Source: ours.
    """
    check_version()

    def mine() -> Description:
        if not isinstance(engine, PipelineEngine):
            raise TypeError(
                "sends between stages are those of a PipelineEngine; this engine is a "
                f"{type(engine).__name__}: give deepspeed.initialize a PipelineModule"
            )
        if not is_plain(engine):
            raise TypeError(
                f"the sends of a {type(engine).__name__} are not those of a PipelineEngine: "
                "pipeline_codec does not know its schedule"
            )
        if engine.is_pipe_partitioned and pipeline_codec != "dense":
            raise ValueError(
                "activations are partitioned over tensor-parallel ranks ('pipe_partitioned' of "
                "the config's 'pipeline'), of which pipeline_codec knows 'dense' only"
            )
        has_messages(pipeline_codec, engine.device, cpu_backend())
        return describe(engine.stage_id, engine.module, pipeline_codec, checksum=checksum)

    description = on_all_ranks(mine)
    planned = compare(gather(description), engine.num_stages)
    if (old := engine.__dict__.get("_sparse_comm_sends")) is not None:
        old.ends.remove()
        engine.reset_activation_shape()
    if pipeline_codec == "dense":
        engine.__dict__["_sparse_comm_sends"] = None
        return engine
    if not isinstance(engine, PackedSends):
        object.__setattr__(engine, "__class__", _class(type(engine)))
    engine.__dict__["_sparse_comm_sends"] = _Sends(engine, description, planned, pipeline_codec)
    return engine


def is_plain(engine: Engine) -> bool:
    """Whether it is a PipelineEngine whose instructions are DeepSpeed's: DualPipeV has its own."""
    known = (PipelineEngine._INSTRUCTION_MAP, PackedSends._INSTRUCTION_MAP)
    return isinstance(engine, PipelineEngine) and any(engine._INSTRUCTION_MAP is m for m in known)


class _Sends:
    """An engine's boundaries, and the numbers of the micro-batches that come next."""

    def __init__(
        self,
        engine: Engine,
        description: Description,
        planned: Any,
        codec: str | Codec,
    ) -> None:
        before = behind = None
        if has_messages(codec, engine.device, cpu_backend()):
            before = _boundary(engine, engine.stage_id - 1, codec, description.checksum)
            behind = _boundary(engine, engine.stage_id + 1, codec, description.checksum)
        logs = engine.grid.get_data_parallel_rank() == 0
        self.ends = Ends(engine.module, description, planned, codec, before, behind, logs)
        self._next: dict[Any, int] = {}
        self._count, self._stages = 0, engine.num_stages

    def begin(self, count: int) -> None:
        """A batch of so many micro-batches begins."""
        self._next, self._count = {}, count
        self.ends.begin_step()

    def send(self, boundary: Boundary, what: Any, tensors: Any) -> None:
        """Send the next micro-batch's tensor, or tuple of tensors."""
        several = isinstance(tensors, tuple)
        number = self._number(what)
        boundary.send([*tensors, None] if several else [tensors], number)
        if not torch.is_grad_enabled() and number % self._stages == self._stages - 1:
            boundary.flush()  # or activations of an evaluation would pile up

    def receive(self, boundary: Boundary, what: Any) -> Any:
        """The next micro-batch's tensor, or tuple of tensors; the one after it may come, too."""
        number = self._number(what)
        for expected in range(number, min(number + 2, self._count)):
            boundary.expect(expected)
        received = boundary.receive(number)
        return tuple(received[:-1]) if received[-1] is None else received[0]

    def _number(self, what: Any) -> int:
        number = self._next.get(what, 0)
        self._next[what] = number + 1
        return number


def _boundary(engine: Engine, other: int, codec: str | Codec, checksum: bool) -> Boundary | None:
    """This end of the boundary to another stage."""
    if not 0 <= other < engine.num_stages:
        return None
    rank = engine.grid.stage_to_global(stage_id=other)
    group = dist.group.WORLD
    assert group is not None
    first = _TAG + 2 * min(other, engine.stage_id)

    def wire(way: int) -> TorchWire:
        return TorchWire(group, rank, first + way)

    return boundary_between(engine.stage_id, other, codec, wire, checksum)


class PackedSends(PipelineEngine):
    """Mixed into the class of a pipeline engine."""

    def _exec_schedule(self, pipe_schedule: Any) -> None:
        sends: _Sends | None = self.__dict__.get("_sparse_comm_sends")
        if sends is not None:
            sends.begin(pipe_schedule.micro_batches)
        super()._exec_schedule(pipe_schedule)
        if sends is not None:
            sends.ends.end_step()

    def _exec_send_activations(self, buffer_id: int) -> None:
        if (boundary := self._end("behind")) is None:
            return super()._exec_send_activations(buffer_id)
        self._sends.send(boundary, schedule.SendActivation, self.pipe_buffers["outputs"][buffer_id])
        return None

    def _exec_recv_activations(self, buffer_id: int) -> None:
        if (boundary := self._end("before")) is None:
            return super()._exec_recv_activations(buffer_id)
        received = self._sends.receive(boundary, schedule.RecvActivation)
        for tensor in received if isinstance(received, tuple) else (received,):
            tensor.requires_grad = tensor.is_floating_point()
        self.pipe_buffers["inputs"][buffer_id] = received
        return None

    def _exec_send_grads(self, buffer_id: int) -> None:
        if (boundary := self._end("before")) is None:
            return super()._exec_send_grads(buffer_id)
        inputs = self.pipe_buffers["inputs"][buffer_id]
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        gradients = tuple(_gradient(tensor) for tensor in given)
        several = isinstance(inputs, tuple)
        self._sends.send(boundary, schedule.SendGrad, gradients if several else gradients[0])
        self.pipe_buffers["inputs"][buffer_id] = None
        return None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        if (boundary := self._end("behind")) is None:
            return super()._exec_recv_grads(buffer_id)
        received = self._sends.receive(boundary, schedule.RecvGrad)
        if isinstance(received, tuple):
            received = [gradient for gradient in received if gradient is not None]
        self.grad_layer = received
        return None

    @property
    def _sends(self) -> _Sends:
        found: _Sends = self.__dict__["_sparse_comm_sends"]
        return found

    def _end(self, which: str) -> Boundary | None:
        sends: _Sends | None = self.__dict__.get("_sparse_comm_sends")
        return None if sends is None else getattr(sends.ends, which)

    # DeepSpeed looks its methods up here.
    _INSTRUCTION_MAP = MappingProxyType(
        {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.SendActivation: _exec_send_activations,
            schedule.RecvActivation: _exec_recv_activations,
            schedule.SendGrad: _exec_send_grads,
            schedule.RecvGrad: _exec_recv_grads,
        }
    )


def _gradient(tensor: Tensor) -> Tensor | None:
    """Of what a stage has received: all floating-point tensors have one, as in DeepSpeed."""
    if not tensor.is_floating_point():
        return None
    if tensor.grad is None:
        raise RuntimeError(
            f"an input of shape {tuple(tensor.shape)} of a pipeline stage has got no gradient: "
            "DeepSpeed's pipelines need one for each floating-point tensor"
        )
    return tensor.grad


_classes: dict[type, type] = {}


def _class(base: type) -> type:
    if base not in _classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base] = type(base.__name__, (PackedSends, base), names)
    return _classes[base]
