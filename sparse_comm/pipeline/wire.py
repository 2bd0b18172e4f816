"""How the bytes of messages get from one stage to the next, and a queue at either end.

A message may be of any size. The reader has a buffer of the size that messages had so far, and
neither gloo nor MPI minds if one is shorter; a longer one is announced by a header of its own, and
both ends count with it from then on. So one message is sent where sizes do not grow.

What neighbours send each other in one direction arrives in order.
"""

from __future__ import annotations

import concurrent.futures as futures
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .codec import MessageError
from .message import HEADER, announcement, read_header

__all__ = ["Inbox", "Incoming", "Message", "Outbox", "TorchWire", "Wire"]

_ROOM = 1 << 12  # a multiple of it is a buffer's size


class Message(Protocol):
    """One that is under way."""

    def wait(self) -> Any:
        """Until it has left its tensor, or something has come."""


class Wire(Protocol):
    """One direction of a boundary.

    Attributes:
        in_threads: whether its messages may be waited for, and sent, in threads.
    """

    in_threads: bool

    def send(self, tensor: Tensor) -> Message:
        """Start to send a uint8 tensor."""

    def receive(self, tensor: Tensor) -> Message:
        """Start to receive into a uint8 tensor, which may be larger than what comes."""


class TorchWire:
    """torch.distributed's messages between two ranks, on gloo.

    Args:
        group: that both are in.
        rank: the other's, in the default group.
        tag: no other messages between the two have it.

    Raises:
        ValueError: the group is not gloo's: NCCL takes no message of another size than announced.
    """

    in_threads = True

    def __init__(self, group: dist.ProcessGroup | None, rank: int, tag: int) -> None:
        if (backend := dist.get_backend(group)) != "gloo":
            raise ValueError(
                f"messages of changing size need a gloo group, this one is {backend}'s: "
                "pipeline_codec='channels' and 'dense' work on any"
            )
        self._group, self._rank, self._tag = group, rank, tag

    def send(self, tensor: Tensor) -> Message:
        """See Wire."""
        work = dist.isend(tensor, self._rank, self._group, self._tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor) -> Message:
        """See Wire."""
        work = dist.irecv(tensor, self._rank, self._group, self._tag)
        assert work is not None
        return work


class _Room:
    """The size of the reader's buffer, which both ends know: messages so far went through both."""

    def __init__(self) -> None:
        self.size = HEADER

    def grow(self, nbytes: int) -> None:
        self.size = max(self.size, -(-nbytes // _ROOM) * _ROOM)


_Jobs = queue.SimpleQueue[tuple[futures.Future[Any], Callable[[], Any]] | None]


class _Thread:
    """Does one thing after another, and does not keep a process from ending."""

    def __init__(self, name: str, is_thread: bool) -> None:
        self._jobs: _Jobs | None = None
        if is_thread:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_work_off, args=(self._jobs,), name=name, daemon=True).start()

    def do(self, job: Callable[[], Any]) -> futures.Future[Any]:
        """Later, or at once where there are no threads."""
        future: futures.Future[Any] = futures.Future()
        if self._jobs is None:
            future.set_result(job())
        else:
            self._jobs.put((future, job))
        return future

    def end(self) -> None:
        """After what it has to do."""
        if self._jobs is not None:
            self._jobs.put(None)


def _work_off(jobs: _Jobs) -> None:
    while (given := jobs.get()) is not None:
        future, job = given
        del given
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        del future, job  # or they would live until the next one


class Outbox:
    """Messages to a neighbour: made, and sent, while the caller goes on.

    Args:
        wire: to the neighbour.
        name: of the thread.
    """

    def __init__(self, wire: Wire, name: str) -> None:
        self._wire = wire
        self._thread = _Thread(f"sparse_comm-{name}", wire.in_threads)
        self._room = _Room()
        self._leaving: deque[futures.Future[Any]] = deque()
        self._sent: deque[tuple[Message, Tensor]] = deque()

    def put(self, make: Callable[[], Tensor]) -> None:
        """Send what ``make()`` gives, after all that was put before.

        Raises:
            Exception: what an earlier one met.
        """
        while self._leaving and self._leaving[0].done():
            self._leaving.popleft().result()
        self._leaving.append(self._thread.do(lambda: self._send(make())))

    def flush(self) -> None:
        """Wait until all have left.

        Raises:
            Exception: what one met.
        """
        self._leaving.append(self._thread.do(lambda: self._wait_for(0)))
        while self._leaving:
            self._leaving.popleft().result()

    def close(self) -> None:
        """Flush, and send nothing any more."""
        self.flush()
        self._thread.end()

    def _send(self, message: Tensor) -> None:
        parts = [message]
        if message.numel() > self._room.size:
            parts.insert(0, announcement(message))
            self._room.grow(message.numel())
        self._wait_for(2)  # before this one: the one that is on its way, and the next
        for part in parts:
            self._sent.append((self._wire.send(part), part))

    def _wait_for(self, left: int) -> None:
        while len(self._sent) > left:
            self._sent[0][0].wait()
            self._sent.popleft()


class Incoming:
    """A message that was asked for.

    Attributes:
        request: what the wire gave for it where nothing waits in a thread; None before its turn.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.request: Any = None
        self.future: futures.Future[Any] = futures.Future()

    def result(self) -> Any:
        """What was read of it; waits until it is there.

        Raises:
            Exception: what receiving or reading it met.
        """
        self._inbox.resolve(self)
        return self.future.result()


class Inbox:
    """Messages from a neighbour: received, and read, while the caller goes on.

    Args:
        wire: from the neighbour.
        name: of the threads.
        read: called with each message, in their order; the message's memory is its own.
    """

    def __init__(self, wire: Wire, name: str, read: Callable[[Tensor], Any]) -> None:
        self._wire = wire
        self._receiving = _Thread(f"sparse_comm-{name}", wire.in_threads)
        self._reading = _Thread(f"sparse_comm-{name}-read", wire.in_threads)
        self._room = _Room()
        self._read = read
        self._asked: deque[Incoming] = deque()  # where nothing is done in threads
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Receive nothing any more; nothing is asked for that has not come."""
        self._receiving.end()
        self._reading.end()

    def ask(self) -> Incoming:
        """One more message may come; the n-th that is asked for is the n-th that was sent."""
        incoming = Incoming(self)
        if self._wire.in_threads:
            self._receiving.do(lambda: self._in_thread(incoming.future))
        else:
            self._asked.append(incoming)
            self._post()
        return incoming

    def _in_thread(self, future: futures.Future[Any]) -> None:
        try:
            buffer = torch.empty(self._room.size, dtype=torch.uint8)
            self._wire.receive(buffer).wait()
            message = self._whole(buffer)
        except BaseException as error:
            future.set_exception(error)
            return
        self._reading.do(lambda: self._resolve(future, message))

    def _whole(self, buffer: Tensor) -> Tensor:
        """The message whose first bytes have come."""
        header = read_header(buffer)
        if header.announces:
            self._room.grow(header.nbytes)
            buffer = torch.empty(header.nbytes, dtype=torch.uint8)
            self._wire.receive(buffer).wait()
        if header.nbytes > buffer.numel():
            raise MessageError(
                f"a message of {header.nbytes} bytes came where {buffer.numel()} fit"
            )
        return buffer[: header.nbytes]

    def _resolve(self, future: futures.Future[Any], message: Tensor) -> None:
        try:
            future.set_result(self._read(message))
        except BaseException as error:
            future.set_exception(error)

    # ---------------------------------------------------------------- without threads

    def _post(self) -> None:
        """Give the first that was asked for its place: its size is known when others are read."""
        if self._asked and self._asked[0].request is None:
            self._buffer = torch.empty(self._room.size, dtype=torch.uint8)
            self._asked[0].request = self._wire.receive(self._buffer)

    def resolve(self, incoming: Incoming) -> None:
        """Receive and read all up to this one, unless threads do."""
        while self._asked and not incoming.future.done():
            first = self._asked[0]
            first.request.wait()
            message = self._whole(self._buffer)
            self._asked.popleft()
            self._post()
            self._resolve(first.future, message)
