"""Messages between neighbouring pipeline stages: over MPI, as AxoNN's, or torch.distributed.

Each stage sends its micro-batches to a neighbour in order, and neither MPI nor gloo lets one
overtake another: the n-th activation that arrives is that of micro-batch n, and so are gradients.
So nothing but the tensors travels.
"""

from __future__ import annotations

import concurrent.futures as futures
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from .modules import ax, mpi

__all__ = ["MPITransport", "Request", "TorchTransport", "Transport"]


class Request(Protocol):
    """A message under way; with MPI's names, by which AxoNN asks for it."""

    def Wait(self) -> Any:
        """Until it has arrived, or has left its tensor."""

    def Test(self) -> bool:
        """Whether it has."""


class Transport(Protocol):
    """How stages, numbered from 0, reach their neighbours."""

    def send(self, tensor: Tensor, stage: int) -> Request:
        """Start to send a contiguous tensor, which must not change until it has left."""

    def receive(self, tensor: Tensor, stage: int) -> Request:
        """Start to receive into a contiguous tensor of the size that was sent."""

    def first(self, requests: Sequence[Any]) -> int:
        """Wait until one of the requests is done; returns which."""


class MPITransport:
    """MPI's point-to-point messages, over AxoNN's own communicator of the pipeline.

    AxoNN's messages are of ``MPI.FLOAT``, and so cannot be of an odd number of 16-bit elements.
    """

    def send(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        request: Request = ax.comm_handle.p2p_mpi_comm.Isend(_bytes(tensor), stage)
        return request

    def receive(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        request: Request = ax.comm_handle.p2p_mpi_comm.Irecv(_bytes(tensor), stage)
        return request

    def first(self, requests: Sequence[Any]) -> int:
        """See Transport."""
        return int(mpi.Request.Waitany(list(requests)))


def _bytes(tensor: Tensor) -> Any:
    return [mpi.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), mpi.BYTE]


class TorchTransport:
    """gloo's point-to-point messages, over a process group of the pipeline's own.

    gloo does not say whether a message has arrived but to whoever waits for it: for each neighbour
    and direction a thread does.

    Args:
        group: the ranks of the pipeline, in the order of the stages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._threads: dict[tuple[str, int], futures.ThreadPoolExecutor] = {}

    def send(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        work = dist.isend(tensor, self._ranks[stage], group=self._group)
        assert work is not None  # for which a rank would have to be outside of the group
        return _Waited(self._thread("send", stage).submit(work.wait))

    def receive(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        work = dist.irecv(tensor, self._ranks[stage], group=self._group)
        assert work is not None
        return _Waited(self._thread("receive", stage).submit(work.wait))

    def first(self, requests: Sequence[Any]) -> int:
        """See Transport."""
        futures.wait([r.future for r in requests], return_when=futures.FIRST_COMPLETED)
        number = next(n for n, request in enumerate(requests) if request.future.done())
        requests[number].Wait()
        return number

    def _thread(self, direction: str, stage: int) -> futures.ThreadPoolExecutor:
        key = (direction, stage)
        if key not in self._threads:
            name = f"sparse_comm-{direction}-{stage}"
            self._threads[key] = futures.ThreadPoolExecutor(1, thread_name_prefix=name)
        return self._threads[key]


class _Waited:
    """A message that a thread waits for."""

    __slots__ = ("future",)

    def __init__(self, future: futures.Future[Any]) -> None:
        self.future = future

    def Wait(self) -> None:
        self.future.result()

    def Test(self) -> bool:
        if not self.future.done():
            return False
        self.future.result()  # raises what the thread met
        return True
