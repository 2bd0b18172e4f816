"""One boundary between two stages, as one of them sees it: what it sends and what it receives.

The writer sends activations and receives their gradients; the reader the other way round. Both keep
what a codec wants to know of a micro-batch from its activation to its gradient.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_comm.reduce.span import span

from .codec import Codec, Kept, MessageError
from .message import decode, encode, read_header
from .support import drop_origin
from .wire import Inbox, Incoming, Outbox, Wire
from .zeros import Zeros

__all__ = ["Boundary", "Traffic", "boundary_between"]


_LATEST = 64  # messages: a training has millions


@dataclass
class Traffic:
    """What went one way over a boundary.

    Attributes:
        messages: how many.
        dense: bytes of their tensors.
        sent: bytes of the messages.
        seconds: of encoding, or of decoding, of the latest messages.
    """

    messages: int = 0
    dense: int = 0
    sent: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))

    def add(self, tensors: Sequence[Tensor | None], message: Tensor, seconds: float) -> None:
        """One more message."""
        self.messages += 1
        self.dense += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        self.sent += message.numel()
        self.seconds.append(seconds)


class Boundary:
    """A stage's end of a boundary.

    Args:
        name: for errors and the log.
        codec: of what this end sends; it may be replaced between steps.
        out: to the neighbour.
        back: from the neighbour.
        writes: whether this is the writer's end, which sends activations and receives gradients.
        checksum: whether messages have one.

    Attributes:
        name: as given.
        codec: as given.
        is_plain: whether the framework could send what was sent: it takes contiguous tensors.
    """

    def __init__(
        self,
        name: str,
        codec: Codec,
        out: Wire,
        back: Wire,
        *,
        writes: bool,
        checksum: bool = False,
    ) -> None:
        self.name, self.codec, self._writes, self._checksum = name, codec, writes, checksum
        self._out, self._back = out, back
        self._outbox = Outbox(out, f"send-{name}")
        self._inbox = Inbox(back, self._read)
        self._coming: dict[int, Incoming] = {}
        self._kept: dict[int, list[Kept | None]] = {}
        self._sent, self._received = Traffic(), Traffic()
        self._has_sent, self._has_received = False, False
        self.is_plain = True

    @property
    def is_measured(self) -> bool:
        """Whether something has gone both ways."""
        return self._has_sent and self._has_received

    def send(self, tensors: Sequence[Tensor | None], number: int) -> None:
        """Send the tensors of a micro-batch; they may be written to afterwards.

        Gradients answer what was received under the same number.

        Raises:
            Exception: what an earlier one met.
        """
        with span("encode", "pipeline"):
            start = time.perf_counter()
            kept = None if self._writes else self._kept.pop(number, None)
            message, mine = encode(
                tensors, self.codec, kept, number=number, checksum=self._checksum
            )
            if self._writes:
                self._kept[number] = mine
            seconds = time.perf_counter() - start
        for tensor in tensors:
            drop_origin(tensor)
        self._sent.add(tensors, message, seconds)
        self._has_sent = True
        self.is_plain &= all(tensor is None or tensor.is_contiguous() for tensor in tensors)
        with span("send", "pipeline"):
            self._outbox.put(message)

    def expect(self, number: int) -> Incoming:
        """Let the tensors of a micro-batch come; to be called in the order of sending."""
        if number not in self._coming:
            self._coming[number] = self._inbox.ask()
        return self._coming[number]

    def receive(self, number: int) -> list[Tensor | None]:
        """The tensors of a micro-batch; waits until they are there.

        Raises:
            MessageError: what came cannot be read.
            RuntimeError: it is another micro-batch's.
        """
        incoming = self.expect(number)
        del self._coming[number]
        try:
            with span("receive", "pipeline"):
                tensors, found = incoming.result()
        except MessageError as error:
            raise MessageError(f"{self.name}: {error}") from error
        if found != number:
            raise RuntimeError(
                f"{self.name}: micro-batch {number} was expected, {found} came: the stages follow "
                "different schedules"
            )
        return list(tensors)

    def _read(self, message: Tensor) -> tuple[list[Tensor | None], int]:
        with span("decode", "pipeline"):
            start = time.perf_counter()
            number = read_header(message).number
            kept = self._kept.pop(number, None) if self._writes else None
            tensors, theirs = decode(message, kept, codec=self.codec, checksum=self._checksum)
            if not self._writes:
                self._kept[number] = theirs
            seconds = time.perf_counter() - start
        self._received.add(tensors, message, seconds)
        self._has_received = True
        return tensors, number

    def exchange_plain(self, size: int) -> None:
        """Send and receive bytes without messages around them, as frameworks do.

        Both ends call it while nothing else is under way.

        Args:
            size: bytes in each direction.
        """
        given, taken = (torch.empty(size, dtype=torch.uint8) for _ in range(2))
        coming, leaving = self._back.receive(taken), self._out.send(given)
        coming.wait()
        leaving.wait()  # wires do not keep the tensors

    def flush(self) -> None:
        """Wait until all that was sent has left.

        Raises:
            Exception: what one met.
        """
        self._outbox.flush()

    def forget(self) -> None:
        """Drop what was kept for gradients that will not come, as those of an evaluation."""
        self._kept.clear()

    def take_traffic(self) -> tuple[Traffic, Traffic]:
        """What was sent and what was received since the last time."""
        taken = self._sent, self._received
        self._sent, self._received = Traffic(), Traffic()
        return taken


def boundary_between(
    index: int, other: int, codec: str | Codec, wire: Callable[[int], Wire], checksum: bool
) -> Boundary:
    """A stage's end of the boundary to a neighbour.

    Args:
        index: of the stage.
        other: of its neighbour.
        codec: that was asked for; by name, zeros are left out until ``auto`` has chosen.
        wire: makes one, to or from the neighbour: 0 of activations, 1 of gradients.
        checksum: whether messages have one.
    """
    first, writes = min(index, other), other > index
    out, back = (wire(0), wire(1)) if writes else (wire(1), wire(0))
    chosen = Zeros() if isinstance(codec, str) else codec
    name = f"stages {first} and {first + 1}"
    return Boundary(name, chosen, out, back, writes=writes, checksum=checksum)
