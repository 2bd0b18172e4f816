"""How the bytes of messages get from one stage to the next, and a queue at either end.

A message may be of any size. The reader has a buffer of the size that messages had so far, and
neither gloo nor MPI minds if one is shorter; a longer one is announced by a header of its own, and
both ends count with it from then on. So one message is sent where sizes do not grow.

What neighbours send each other in one direction arrives in order. Encoding and decoding are the
caller's work, in its own thread: in threads of their own both were slower where a rank has one core
(steps of scripts/compare_comm.py --pipeline took up to 1.15 times as long), and what has been
encoded travels while the caller goes on.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .codec import MessageError
from .message import HEADER, announcement, read_header

__all__ = ["Inbox", "Incoming", "Message", "Outbox", "TorchWire", "Wire", "cpu_backend"]

_ROOM = 1 << 12  # a multiple of it is a buffer's size
_MANY = 8  # messages that may be leaving before a thread waits for them


class Message(Protocol):
    """One that is under way."""

    def wait(self) -> Any:
        """Until it has left its tensor, or something has come."""

    def is_completed(self) -> bool:
        """Whether it has; False, too, where that is not known to who does not wait."""


class Wire(Protocol):
    """One direction of a boundary."""

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
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, tag: int) -> None:
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


def cpu_backend(group: dist.ProcessGroup | None = None) -> str:
    """The backend that carries a group's CPU tensors: "gloo", "mpi" or another; "" if none does."""
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get("cpu", "")


class _Room:
    """The size of the reader's buffer, which both ends know: messages so far went through both."""

    def __init__(self) -> None:
        self.size = HEADER

    def grow(self, nbytes: int) -> None:
        self.size = max(self.size, -(-nbytes // _ROOM) * _ROOM)


class Outbox:
    """Messages to a neighbour, which leave while the caller goes on.

    Args:
        wire: to the neighbour.
        name: of the thread that looks after many of them.
    """

    def __init__(self, wire: Wire, name: str) -> None:
        self._wire, self._name = wire, name
        self._room = _Room()
        self._leaving: deque[tuple[Message, Tensor]] = deque()
        self._waiter: threading.Thread | None = None
        self._failure: BaseException | None = None

    def put(self, message: Tensor) -> None:
        """Send a message, after all that were put before.

        Raises:
            Exception: what an earlier one met.
        """
        parts = [message]
        if message.numel() > self._room.size:
            parts.insert(0, announcement(message))
            self._room.grow(message.numel())
        for part in parts:
            self._leaving.append((self._wire.send(part), part))
        self._look_after()

    def _look_after(self) -> None:
        """Let go of messages that have left; gloo tells only who waits, so a thread does."""
        if self._waiter is not None and self._waiter.is_alive():
            return
        self._raise()
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()
        if len(self._leaving) > _MANY:
            batch = [self._leaving.popleft() for _ in range(len(self._leaving))]
            self._waiter = threading.Thread(
                target=self._wait_for, args=(batch,), name=f"sparse_comm-{self._name}", daemon=True
            )
            self._waiter.start()

    def _wait_for(self, batch: list[tuple[Message, Tensor]]) -> None:
        try:
            for number, (work, _) in enumerate(batch):
                work.wait()
                batch[number] = batch[-1]  # its tensor is free
        except BaseException as error:
            self._failure = error

    def _raise(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def flush(self) -> None:
        """Wait until all have left.

        Raises:
            Exception: what one met.
        """
        if self._waiter is not None:
            self._waiter.join()
        self._raise()
        while self._leaving:
            self._leaving[0][0].wait()
            self._leaving.popleft()


class Incoming:
    """A message that was asked for.

    Attributes:
        message: what is under way; None before its turn.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self.message: Message | None = None
        self.read: Any = None
        self.is_read = False

    def result(self) -> Any:
        """What was read of it; waits until it is there.

        Raises:
            Exception: what receiving or reading it met.
        """
        self._inbox.resolve(self)
        return self.read


class Inbox:
    """Messages from a neighbour, which come while the caller does something else.

    Args:
        wire: from the neighbour.
        read: called with each message, in their order; the message's memory is its own.
    """

    def __init__(self, wire: Wire, read: Callable[[Tensor], Any]) -> None:
        self._wire = wire
        self._room = _Room()
        self._read = read
        self._asked: deque[Incoming] = deque()
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def ask(self) -> Incoming:
        """One more message may come; the n-th that is asked for is the n-th that was sent."""
        incoming = Incoming(self)
        self._asked.append(incoming)
        self._post()
        return incoming

    def _post(self) -> None:
        """Give the first its place: its size is known once those before have been looked at."""
        if self._asked and self._asked[0].message is None:
            self._buffer = torch.empty(self._room.size, dtype=torch.uint8)
            self._asked[0].message = self._wire.receive(self._buffer)

    def resolve(self, incoming: Incoming) -> None:
        """Receive and read all up to this one."""
        while not incoming.is_read:
            first = self._asked[0]
            assert first.message is not None
            first.message.wait()
            message = self._whole(self._buffer)
            self._asked.popleft()
            self._post()  # the next one comes while this one is read
            first.is_read = True
            first.read = self._read(message)

    def _whole(self, buffer: Tensor) -> Tensor:
        """The message whose first bytes have come."""
        header = read_header(buffer)
        if header.announces:
            self._room.grow(header.nbytes)
            buffer = torch.empty(header.nbytes, dtype=torch.uint8)
            self._wire.receive(buffer).wait()
        if header.nbytes > buffer.numel():
            raise MessageError(f"a message has {header.nbytes} bytes where {buffer.numel()} fit")
        return buffer[: header.nbytes]
