"""What goes between the stages of AxoNN's pipelines: plain tensors, or what the next stage reads.

AxoNN's engine asks for a message of either kind ("fw": an activation, "bw": a gradient) and takes
the one that comes first, over boundaries that pack and over those that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pipeline import (
    Boundary,
    Codec,
    Ends,
    Incoming,
    Origin,
    TorchWire,
    Wire,
    boundary_between,
    compare,
    describe,
    has_messages,
    set_origin,
)

from .modules import ax, config
from .start import State
from .transport import Awaited, MPITransport, TorchTransport, in_memory

__all__ = ["Posted", "Sends", "make_sends"]

_TAG = 0x5A0000  # of the first packed message; plain ones have 0


class Sends:
    """A stage's messages to its neighbours, and from them.

    Over a boundary that packs, messages say what they hold; over the others tensors travel in the
    dtype and of the shapes that the stages have agreed on, as in AxoNN.

    Args:
        model: the stage.
        state: of ``init``.
        dtype: of the messages.
        ends: the boundaries; None of those that do not pack.
    """

    def __init__(self, model: nn.Module, state: State, dtype: torch.dtype, ends: Ends) -> None:
        self._model, self._dtype, self.ends = model, dtype, ends
        self._transport, self._device = state.transport, state.device
        self._leaving: list[tuple[Any, Tensor]] = []
        self._next: dict[str, int] = {}

    def begin(self) -> None:
        """A batch begins."""
        self._next = {}
        self.ends.begin_step()

    def send(self, tensor: Tensor, stage: int, evaluates: bool) -> None:
        """Start to send a micro-batch's activation, with its graph, or its gradient."""
        forward = stage > config.inter_layer_parallel_rank
        boundary = self.ends.behind if forward else self.ends.before
        if boundary is None:
            self._send_plain(tensor.detach().contiguous().to(self._dtype), stage, evaluates)
            return
        number = self._number("sent forward" if forward else "sent back")
        sent = tensor.to(self._dtype)
        if sent is not tensor:
            set_origin(sent, Origin(source=tensor))
        boundary.send([sent], number)
        if evaluates and number % config.G_inter == config.G_inter - 1:
            boundary.flush()  # or activations would pile up

    def _send_plain(self, tensor: Tensor, stage: int, evaluates: bool) -> None:
        if evaluates and len(self._leaving) == config.G_inter:
            self._leaving[0][0].Wait()
        self._leaving = [sent for sent in self._leaving if not sent[0].Test()]
        if tensor.is_cuda:
            torch.cuda.synchronize()
        assert self._transport is not None
        self._leaving.append((self._transport.send(tensor, stage), tensor))

    def post(self, kind: str) -> Posted | None:
        """Let the next message of a kind come, if there is a stage that sends it."""
        forward = kind == "fw"
        stage = config.inter_layer_parallel_rank + (-1 if forward else 1)
        if not 0 <= stage < config.G_inter:
            return None
        boundary = self.ends.before if forward else self.ends.behind
        if boundary is not None:
            number = self._number(kind)
            return Posted(boundary.expect(number), lambda: _only(boundary.receive(number)))
        which = self._model.get_input_shape if forward else self._model.get_output_shape
        shape = [config.micro_batch_size if n == -1 else n for n in which()]  # type: ignore[operator]
        if (channels := self.ends.channels[not forward]) is not None:
            shape[channels.dim] = channels.kept.numel()
        tensor = torch.empty(shape, device=self._device, dtype=self._dtype)
        assert self._transport is not None
        request = self._transport.receive(tensor, stage)

        def take() -> Tensor:
            request.Wait()
            return tensor

        return Posted(request, take)

    def first(self, posted: Sequence[Posted]) -> int:
        """Wait until one of the messages has come, or its first part; returns which."""
        assert self._transport is not None
        return self._transport.first([one.under_way for one in posted])

    def flush(self) -> None:
        """Wait until all have left."""
        for request, _ in self._leaving:
            request.Wait()
        self._leaving = []
        self.ends.end_step()

    def _number(self, what: str) -> int:
        number = self._next.get(what, 0)
        self._next[what] = number + 1
        return number


@dataclass(frozen=True)
class Posted:
    """A message that may come.

    Attributes:
        request: an Incoming, or the transport's request.
        take: waits for its tensor.
    """

    request: Any
    take: Callable[[], Tensor]

    @property
    def under_way(self) -> Any:
        """What the transport knows of it."""
        if not isinstance(self.request, Incoming):
            return self.request
        message = self.request.message
        return message.request if isinstance(message, _MPIMessage) else message


def _only(tensors: list[Tensor | None]) -> Tensor:
    (tensor,) = tensors
    assert tensor is not None
    return tensor


def make_sends(
    model: nn.Module,
    state: State,
    dtype: torch.dtype,
    codec: str | Codec,
    checksum: bool,
) -> Sends:
    """The sends of a stage. A collective of all ranks.

    Raises:
        ValueError: on all ranks: an unknown codec; "zeros" on GPUs; stages with different codecs.
    """
    index = config.inter_layer_parallel_rank

    def described() -> Any:
        has_messages(codec, state.device)
        return describe(index, model, codec, checksum=checksum)

    description = on_all_ranks(described)
    planned = compare(gather(description), config.G_inter)
    before = behind = None
    if has_messages(codec, state.device):
        before = _boundary(state, index, index - 1, codec, checksum)
        behind = _boundary(state, index, index + 1, codec, checksum)
    logs = config.data_parallel_rank == 0 and config.intra_layer_parallel_rank == 0
    ends = Ends(model, description, planned, codec, before, behind, logs)
    return Sends(model, state, dtype, ends)


def _boundary(
    state: State, index: int, other: int, codec: str | Codec, checksum: bool
) -> Boundary | None:
    """This end of the boundary to another stage."""
    if not 0 <= other < config.G_inter:
        return None
    first = _TAG + 2 * min(index, other)

    def wire(way: int) -> Wire:
        if isinstance(state.transport, MPITransport):
            return _MPIWire(other, first + way)
        return _TorchWire(state, other, first + way)

    return boundary_between(index, other, codec, wire, checksum)


class _TorchWire(TorchWire):
    """torch.distributed's, whose messages may be waited for in a thread of the transport."""

    def __init__(self, state: State, stage: int, tag: int) -> None:
        rank = dist.get_process_group_ranks(state.pipeline)[stage]
        super().__init__(state.pipeline, rank, tag)
        assert isinstance(state.transport, TorchTransport)
        self._transport, self._stage = state.transport, stage

    def receive(self, tensor: Tensor) -> Awaited:
        """See sparse_comm.pipeline.Wire."""
        return self._transport.awaited(super().receive(tensor), self._stage)


class _MPIWire:
    """MPI's messages, over AxoNN's communicator of the pipeline."""

    def __init__(self, stage: int, tag: int) -> None:
        self._stage, self._tag = stage, tag - _TAG + 1  # plain messages have 0

    def send(self, tensor: Tensor) -> _MPIMessage:
        """See sparse_comm.pipeline.Wire."""
        comm = ax.comm_handle.p2p_mpi_comm
        return _MPIMessage(comm.Isend(in_memory(tensor), self._stage, self._tag), tensor)

    def receive(self, tensor: Tensor) -> _MPIMessage:
        """See sparse_comm.pipeline.Wire."""
        comm = ax.comm_handle.p2p_mpi_comm
        return _MPIMessage(comm.Irecv(in_memory(tensor), self._stage, self._tag), tensor)


class _MPIMessage:
    def __init__(self, request: Any, tensor: Tensor) -> None:
        self.request = request
        self._tensor = tensor  # MPI has its address only

    def wait(self) -> None:
        self.request.Wait()

    def is_completed(self) -> bool:
        return bool(self.request.Test())
