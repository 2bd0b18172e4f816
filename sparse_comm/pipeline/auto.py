"""The choice between sending zeros and leaving them out: by what a step has shown, and the link.

Both ends of a boundary choose for what they send, after the first step that trained. Its messages
left zeros out; they say how many bytes that saves, and what encoding and decoding took. The link is
measured as it would be used: with all bytes as frameworks send them, and with fewer within messages
of ours, whose own cost is more than zeros save where a link is fast.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median, median_low

import torch

from .boundary import Boundary, Traffic
from .channels import Channels
from .codec import Codec
from .dense import Dense
from .zeros import Zeros

__all__ = ["Choice", "choose"]

_PING = (1 << 32) - 1  # the number of no micro-batch
_BURST = 1 << 21  # bytes that a shaped link lets through at once, or more
_UNTIMED = 16  # messages at most that use it up: of small ones the latency is what counts
_TIMED = 7


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
    sent, received = boundary.take_traffic()
    each = max(sent.messages, 1)
    dense, packed = max(sent.dense // each, 1), sent.sent // each
    theirs = [int(size) for size in _swap(boundary, f"{dense} {packed}").split()]
    untimed = min(-(-_BURST // max(dense, theirs[0])), _UNTIMED)  # the same at both ends
    times = [
        _seconds(boundary, dense, theirs[0], untimed, plain=True),
        _seconds(boundary, packed, theirs[1], untimed, plain=False),
        _typical(received.seconds),
    ]
    all_of_it, message, decoding = map(float, _swap(boundary, " ".join(map(str, times))).split())
    codec, why = _better(sent, all_of_it, message + decoding + _typical(sent.seconds))
    sends = packed if isinstance(codec, Zeros) else dense
    mine = f"{dense} {codec.name}, {sends:,} of {{:,}} bytes ({why})"
    answers = _swap(boundary, mine)
    planned = f"{channels.why}; " if channels is not None else ""
    ways = {"activations": mine, "gradients": answers}
    said = "; ".join(_said(way, text, channels) for way, text in ways.items())
    rate = dense / all_of_it / 1e6
    text = f"{boundary.name}, a micro-batch: {planned}{said}; {rate:,.0f} MB/s"
    both_dense = codec.name == "dense" and answers.split()[1] == "dense,"
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


def _typical(seconds: list[float]) -> float:
    """Of a message, not counting the first one's start where there are several."""
    return median_low(seconds) if seconds else 0.0


def _seconds(boundary: Boundary, mine: int, theirs: int, untimed: int, *, plain: bool) -> float:
    """Until ``theirs`` bytes have come, if ``mine`` go the other way at once, as in a step."""
    found = []
    for _ in range(untimed + _TIMED):
        start = time.perf_counter()
        if plain:
            boundary.exchange_plain(mine, theirs)
        else:
            boundary.send([torch.empty(mine, dtype=torch.uint8)], _PING)
            boundary.receive(_PING)
        found.append(time.perf_counter() - start)
    boundary.take_traffic()
    return median(found[untimed:])  # single ones take ten times as long (BBR's pacing)


def _better(sent: Traffic, dense: float, zeros: float) -> tuple[Codec, str]:
    """The codec that takes less time on this link, of what it sends and computes on both sides."""
    if sent.sent >= sent.dense:
        return Dense(), "nothing to leave out"
    zeros_take, all_takes = f"zeros: {zeros * 1e3:.2f} ms", f"all: {dense * 1e3:.2f} ms"
    if zeros >= dense:
        return Dense(), f"{all_takes}, without {zeros_take}"
    return Zeros(), f"without {zeros_take}, {all_takes}"
