"""Messages between neighbouring pipeline stages: over MPI, as AxoNN's, or torch.distributed.

Each stage sends its micro-batches to a neighbour in order, and neither MPI nor gloo lets one
overtake another: the n-th activation that arrives is that of micro-batch n, and so are gradients.
So nothing but the tensors travels.
"""

from __future__ import annotations

import collections
import concurrent.futures as futures
import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from .modules import ax, mpi

__all__ = ["Awaited", "MPITransport", "Request", "TorchTransport", "Transport", "in_memory"]


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
        request: Request = ax.comm_handle.p2p_mpi_comm.Isend(in_memory(tensor), stage)
        return request

    def receive(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        request: Request = ax.comm_handle.p2p_mpi_comm.Irecv(in_memory(tensor), stage)
        return request

    def first(self, requests: Sequence[Any]) -> int:
        """See Transport."""
        return int(mpi.Request.Waitany(list(requests)))


def in_memory(tensor: Tensor) -> Any:
    """A tensor's bytes, as mpi4py takes them."""
    return [mpi.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), mpi.BYTE]


class TorchTransport:
    """gloo's point-to-point messages, over a process group of the pipeline's own.

    gloo does not say whether a message is done but to whoever waits for it. So threads wait, one a
    neighbour and direction, but only where nothing else will do: a stage that has one neighbour to
    hear from waits itself, and what a stage has sent is looked after many messages at a time.

    Args:
        group: the ranks of the pipeline, in the order of the stages.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_process_group_ranks(group)
        self._sending: dict[int, _Leaving] = {}
        self._threads: dict[int, _Thread] = {}

    def send(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        work = dist.isend(tensor, self._ranks[stage], group=self._group)
        if stage not in self._sending:
            self._sending[stage] = _Leaving(stage)
        return _Sent(work, self._sending[stage])

    def receive(self, tensor: Tensor, stage: int) -> Request:
        """See Transport."""
        return self.awaited(dist.irecv(tensor, self._ranks[stage], group=self._group), stage)

    def awaited(self, work: Any, stage: int) -> Awaited:
        """A message from a stage, for which this transport's thread may wait."""
        if stage not in self._threads:
            self._threads[stage] = _thread("receive", stage)
        return Awaited(work, self._threads[stage])

    def first(self, requests: Sequence[Any]) -> int:
        """See Transport."""
        number = 0
        if len(requests) > 1:
            pending = [request.in_thread() for request in requests]
            futures.wait(pending, return_when=futures.FIRST_COMPLETED)
            number = next(n for n, future in enumerate(pending) if future.done())
        requests[number].Wait()
        return number


class Awaited:
    """A message that is to come."""

    __slots__ = ("_future", "_has_come", "_thread", "_work")

    def __init__(self, work: Any, thread: _Thread) -> None:
        self._work, self._thread, self._has_come = work, thread, False
        self._future: futures.Future[Any] | None = None

    def in_thread(self) -> futures.Future[Any]:
        """Let the thread wait for it."""
        if self._future is None and self._has_come:
            self._future = futures.Future()
            self._future.set_result(None)
        elif self._future is None:
            self._future = self._thread.submit(self._work.wait)
        return self._future

    def Wait(self) -> None:
        if self._future is not None:
            self._future.result()
        elif not self._has_come:  # gloo waits for another one if it is asked again
            self._work.wait()
            self._has_come = True

    def Test(self) -> bool:
        return self.in_thread().done()

    wait, is_completed = Wait, Test  # torch.distributed's names


class _Leaving:
    """Messages to one neighbour, which leave in their order.

    Attributes:
        waiting: of which no thread knows.
        job: a thread's, for those before; None if there is none.
    """

    def __init__(self, stage: int) -> None:
        self._thread = _thread("send", stage)
        self.waiting: collections.deque[_Sent] = collections.deque()
        self.job: futures.Future[None] | None = None

    def poll(self) -> None:
        """Let a thread wait for all that wait now, unless one is at it."""
        if self.job is not None and self.job.done():
            self.job.result()  # raises what the thread met
            self.job = None
        if self.job is None and self.waiting:
            batch = list(self.waiting)
            self.waiting.clear()
            self.job = self._thread.submit(_wait_for, batch)


class _Sent:
    """A message that leaves, or has left."""

    __slots__ = ("_leaving", "left", "work")

    def __init__(self, work: Any, leaving: _Leaving) -> None:
        self.work, self._leaving, self.left = work, leaving, False
        leaving.waiting.append(self)

    def Wait(self) -> None:
        while not self.left:
            if self._leaving.job is not None:
                self._leaving.job.result()
                self._leaving.job = None
            else:
                _wait_for([self._leaving.waiting.popleft()])

    def Test(self) -> bool:
        if not self.left:
            self._leaving.poll()
        return self.left


def _wait_for(batch: Sequence[_Sent]) -> None:
    for sent in batch:
        sent.work.wait()
        sent.left = True


class _Thread:
    """Does one thing after another; unlike an executor's, it does not keep a process from ending.

    What it waits for may never come, where another rank has failed.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[futures.Future[Any], Any, Any]] = queue.SimpleQueue()
        threading.Thread(target=_work_off, args=(self._jobs,), name=name, daemon=True).start()

    def submit(self, function: Any, *args: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()
        self._jobs.put((future, function, args))
        return future


def _work_off(jobs: queue.SimpleQueue[tuple[futures.Future[Any], Any, Any]]) -> None:
    while True:
        future, function, args = jobs.get()
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        del future, function, args  # or they would live until the next job


def _thread(direction: str, stage: int) -> _Thread:
    return _Thread(f"sparse_comm-{direction}-{stage}")
