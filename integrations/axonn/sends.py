"""What goes between the stages of AxoNN's pipelines: plain tensors, or what the next stage reads.

AxoNN's engine asks for a message of either kind ("fw": an activation, "bw": a gradient) and takes
the one that comes first; both ways of sending answer to that.
"""

from __future__ import annotations

import concurrent.futures as futures
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pipeline import (
    Boundary,
    Channels,
    Codec,
    Ends,
    TorchWire,
    Zeros,
    compare,
    describe,
)

from .modules import ax, config, mpi
from .start import State
from .transport import MPITransport, in_memory

__all__ = ["PackedSends", "PlainSends", "Sends", "make_sends"]

_TAG = 0x5A0000  # of the first packed message; plain ones have 0


class Sends(Protocol):
    """A stage's messages to its neighbours, and from them."""

    @property
    def ends(self) -> Ends:
        """What was agreed with the neighbours."""

    def begin(self) -> None:
        """A batch begins."""

    def send(self, tensor: Tensor, stage: int, evaluates: bool) -> None:
        """Start to send a micro-batch's activation, or its gradient, with its graph."""

    def post(self, kind: str) -> Any:
        """Let the next message of a kind come, if there is a stage that sends it."""

    def first(self, posted: Sequence[Any]) -> int:
        """Wait until one of the messages has come; returns which."""

    def take(self, posted: Any) -> Tensor:
        """The tensor of a message."""

    def flush(self) -> None:
        """Wait until all have left."""


def make_sends(
    model: nn.Module,
    state: State,
    dtype: torch.dtype,
    codec: str | Codec,
    masks: Mapping[str, Tensor] | None,
    checksum: bool,
) -> Sends:
    """The sends of a stage. A collective of all ranks.

    Raises:
        ValueError: on all ranks: an unknown codec; "zeros" on GPUs; stages with different codecs.
    """
    index = config.inter_layer_parallel_rank
    packs = codec not in ("dense", "channels") and state.device == "cpu"

    def described() -> Any:
        if codec not in ("auto", "channels", "dense") and state.device != "cpu":
            raise ValueError(
                "pipeline_codec='zeros' works on CPUs; on GPUs there are 'channels' and 'dense', "
                "and 'auto' is 'channels' there"
            )
        return describe(index, model, codec, masks, checksum)

    description = on_all_ranks(described)
    planned = compare(gather(description))
    before = behind = None
    if packs:
        before = _boundary(state, index, index - 1, codec, checksum)
        behind = _boundary(state, index, index + 1, codec, checksum)
    logs = config.data_parallel_rank == 0 and ax.config.intra_layer_parallel_rank == 0
    ends = Ends(model, description, planned, codec, masks, before, behind, logs)
    return PackedSends(ends, dtype) if packs else PlainSends(model, state, dtype, ends)


class PlainSends:
    """Tensors in the dtype and of the shapes that the stages have agreed on, as in AxoNN."""

    def __init__(self, model: nn.Module, state: State, dtype: torch.dtype, ends: Ends) -> None:
        self._model, self._dtype, self._ends = model, dtype, ends
        self._transport, self._device = state.transport, state.device
        self._leaving: list[tuple[Any, Tensor]] = []

    @property
    def ends(self) -> Ends:
        """See Sends."""
        return self._ends

    def begin(self) -> None:
        """See Sends."""
        self._ends.begin_step()

    def send(self, tensor: Tensor, stage: int, evaluates: bool) -> None:
        """See Sends."""
        if evaluates and len(self._leaving) == config.G_inter:
            self._leaving[0][0].Wait()
        self._leaving = [sent for sent in self._leaving if not sent[0].Test()]
        tensor = tensor.detach().contiguous().to(self._dtype)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        assert self._transport is not None
        self._leaving.append((self._transport.send(tensor, stage), tensor))

    def post(self, kind: str) -> Any:
        """See Sends."""
        stage, which, channels = (
            (config.inter_layer_parallel_rank - 1, "get_input_shape", self._ends.channels[0])
            if kind == "fw"
            else (config.inter_layer_parallel_rank + 1, "get_output_shape", self._ends.channels[1])
        )
        if not 0 <= stage < config.G_inter:
            return None
        shape = [config.micro_batch_size if n == -1 else n for n in getattr(self._model, which)()]
        tensor = torch.empty(_sent(shape, channels), device=self._device, dtype=self._dtype)
        assert self._transport is not None
        return tensor, self._transport.receive(tensor, stage)

    def first(self, posted: Sequence[Any]) -> int:
        """See Sends."""
        assert self._transport is not None
        return self._transport.first([request for _, request in posted])

    def take(self, posted: Any) -> Tensor:
        """See Sends."""
        tensor: Tensor = posted[0]
        return tensor

    def flush(self) -> None:
        """See Sends."""
        for request, _ in self._leaving:
            request.Wait()
        self._leaving = []


def _sent(shape: list[int], channels: Channels | None) -> list[int]:
    if channels is not None:
        shape[channels.dim] = channels.kept.numel()
    return shape


class PackedSends:
    """Messages that say what they hold, so that neither dtypes nor shapes are agreed on."""

    def __init__(self, ends: Ends, dtype: torch.dtype) -> None:
        self._ends, self._dtype = ends, dtype
        self._next: dict[Any, int] = {}

    @property
    def ends(self) -> Ends:
        """See Sends."""
        return self._ends

    def begin(self) -> None:
        """See Sends."""
        self._next = {}
        self._ends.begin_step()

    def send(self, tensor: Tensor, stage: int, evaluates: bool) -> None:
        """See Sends."""
        forward = stage > config.inter_layer_parallel_rank
        boundary = self._ends.behind if forward else self._ends.before
        assert boundary is not None
        number = self._number("sent forward" if forward else "sent back")
        boundary.send([tensor.to(self._dtype)], number)
        if evaluates and number % config.G_inter == config.G_inter - 1:
            boundary.flush()  # or activations would pile up

    def post(self, kind: str) -> Any:
        """See Sends."""
        boundary = self._ends.before if kind == "fw" else self._ends.behind
        if boundary is None:
            return None
        number = self._number(kind)
        return boundary, number, boundary.expect(number)

    def first(self, posted: Sequence[Any]) -> int:
        """See Sends."""
        if len(posted) == 1:
            return 0
        incoming = [one for _, _, one in posted]
        if incoming[0].request is not None:
            return int(mpi.Request.Waitany([one.request.request for one in incoming]))
        futures.wait([one.future for one in incoming], return_when=futures.FIRST_COMPLETED)
        return next(n for n, one in enumerate(incoming) if one.future.done())

    def take(self, posted: Any) -> Tensor:
        """See Sends."""
        boundary, number, _ = posted
        (tensor,) = boundary.receive(number)
        assert isinstance(tensor, Tensor)
        return tensor

    def flush(self) -> None:
        """See Sends."""
        self._ends.end_step()

    def _number(self, what: str) -> int:
        number = self._next.get(what, 0)
        self._next[what] = number + 1
        return number


def _boundary(
    state: State, index: int, other: int, codec: str | Codec, checksum: bool
) -> Boundary | None:
    """This end of the boundary to another stage."""
    if not 0 <= other < config.G_inter:
        return None
    first = min(index, other)
    tags = _TAG + 2 * first, _TAG + 2 * first + 1  # of activations, of gradients
    out, back = tags if other > index else tags[::-1]
    wires: list[Any]
    if isinstance(state.transport, MPITransport):
        wires = [_MPIWire(other, out), _MPIWire(other, back)]
    else:
        rank = dist.get_process_group_ranks(state.pipeline)[other]
        wires = [TorchWire(state.pipeline, rank, out), TorchWire(state.pipeline, rank, back)]
    chosen = codec if not isinstance(codec, str) else Zeros()
    name = f"stages {first} and {first + 1}"
    return Boundary(name, chosen, *wires, writes=other > index, checksum=checksum)


class _MPIWire:
    """MPI's messages, over AxoNN's communicator of the pipeline.

    Not in threads: those would keep a core busy while they wait.
    """

    in_threads = False

    def __init__(self, stage: int, tag: int) -> None:
        self._stage, self._tag = stage, tag & 0x7FFF  # MPI promises no larger tags

    def send(self, tensor: Tensor) -> _MPIMessage:
        """See sparse_comm.pipeline.Wire."""
        comm = ax.comm_handle.p2p_mpi_comm
        return _MPIMessage(comm.Isend(in_memory(tensor), self._stage, self._tag))

    def receive(self, tensor: Tensor) -> _MPIMessage:
        """See sparse_comm.pipeline.Wire."""
        comm = ax.comm_handle.p2p_mpi_comm
        return _MPIMessage(comm.Irecv(in_memory(tensor), self._stage, self._tag))


class _MPIMessage:
    def __init__(self, request: Any) -> None:
        self.request = request

    def wait(self) -> None:
        self.request.Wait()
