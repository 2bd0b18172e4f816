"""The choice between sending zeros and leaving them out: by what a step has shown, and the link.

Both ends of a boundary choose for what they send, after the first step that trained. Its messages
left zeros out; they say how many bytes that saves, and what encoding took.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .boundary import Boundary, Traffic
from .channels import Channels
from .codec import Codec
from .dense import Dense
from .zeros import Zeros

__all__ = ["Choice", "choose"]

_PING = (1 << 32) - 1  # the number of no micro-batch
_LEAST = 1 << 12  # bytes of a ping
_BURST = 1 << 21  # bytes that are sent at once, more than a link lets through at first
_AT_ONCE = 16  # messages at most: of small ones the latency is what counts


@dataclass(frozen=True)
class Choice:
    """What both ends of a boundary send.

    Attributes:
        codec: of what this end sends.
        both_dense: whether neither end leaves anything out.
        text: for the log of the writer.
    """

    codec: Codec
    both_dense: bool
    text: str


def choose(boundary: Boundary, channels: Channels | None) -> Choice:
    """Choose a codec for what this end sends. Both ends call it, before a step.

    Args:
        boundary: over which activations and gradients have gone, with ``Zeros``.
        channels: of the boundary, if some are left out.

    Source: ours.
    """
    sent, _ = boundary.take_traffic()
    rate = _rate(boundary, sent)
    codec, why = _better(sent, rate)
    each = max(sent.messages, 1)
    sends = sent.sent if isinstance(codec, Zeros) else sent.dense
    mine = f"{sent.dense // each} {codec.name}, {sends / each:,.0f} of {{:,}} bytes ({why})"
    theirs = _swap(boundary, mine)
    planned = f"{channels.why}; " if channels is not None else ""
    ways = {"activations": mine, "gradients": theirs}
    said = "; ".join(_said(way, text, channels) for way, text in ways.items())
    text = f"{boundary.name}, a micro-batch: {planned}{said}; {rate / 1e6:,.0f} MB/s"
    both_dense = codec.name == "dense" and theirs.split()[1] == "dense,"
    return Choice(codec, both_dense, text)


def _said(way: str, text: str, channels: Channels | None) -> str:
    """Of how many bytes: those before channels were left out."""
    dense, _, rest = text.partition(" ")
    whole = int(dense) if channels is None else round(int(dense) / channels.density)
    return f"{way} {rest.format(whole)}"


def _swap(boundary: Boundary, text: str) -> str:
    """The neighbour's text for this end's."""
    boundary.send([torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)], _PING)
    (received,) = boundary.receive(_PING)
    assert received is not None
    boundary.take_traffic()
    return received.numpy().tobytes().decode()


def _rate(boundary: Boundary, sent: Traffic) -> float:
    """Bytes a second that go over a boundary in each direction, both at once, as in a step."""
    mine = sent.dense // max(sent.messages, 1)
    size = max(mine, int(_swap(boundary, str(mine))), _LEAST)  # the same at both ends
    count = min(-(-_BURST // size), _AT_ONCE)
    for _ in range(2):  # the first finds buffers small, and a shaped link idle
        start = time.perf_counter()
        for _ in range(count):
            boundary.send([torch.empty(size, dtype=torch.uint8)], _PING)
        for _ in range(count):
            boundary.receive(_PING)
        seconds = time.perf_counter() - start
    boundary.take_traffic()
    return count * size / seconds


def _better(sent: Traffic, rate: float) -> tuple[Codec, str]:
    """The codec that takes less time on this link, counting what it computes on both sides."""
    saved = (sent.dense - sent.sent) / rate
    if saved <= 0:
        return Dense(), "nothing to leave out"
    if saved < 2 * sent.seconds:
        return Dense(), "zeros would cost more time than they save"
    return Zeros(), f"zeros save {saved / sent.messages * 1e3:.2f} ms each"
