"""The choice between sending zeros and leaving them out: by what a step has shown, and the link.

Both ends of a boundary choose for what they send, after the first step that trained. Its messages
left zeros out; they say how many bytes that saves, and what encoding and decoding took. The link is
measured as it would be used: with all bytes as frameworks send them, and with fewer within messages
of ours, whose own cost is more than zeros save where a link is fast.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

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
_TURNS, _TIMED = 3, 3  # of so many messages at most


@dataclass(frozen=True)
class Choice:
    """What both ends of a boundary send.

    Attributes:
        codec: of what this end sends.
        both_dense: whether neither end leaves anything out, and frameworks can send it.
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
    dense, packed = (total // max(sent.messages, 1) for total in (sent.dense, sent.sent))
    codec, why, rate = _pick(boundary, dense, packed, sent, received)
    sends = packed if isinstance(codec, Zeros) else dense
    is_done = codec.name == "dense" and boundary.is_plain
    mine = f"{is_done:d} {dense} {codec.name}, {sends:,} of {{:,}} bytes ({why})"
    theirs = _swap(boundary, mine)
    planned = f"{channels.why}; " if channels is not None else ""
    ways = {"activations": mine, "gradients": theirs}
    said = "; ".join(_said(way, text, channels) for way, text in ways.items())
    text = f"{boundary.name}, a micro-batch: {planned}{said}{rate}"
    return Choice(codec, is_done and theirs[0] == "1", text)


def _pick(
    boundary: Boundary, dense: int, packed: int, sent: Traffic, received: Traffic
) -> tuple[Codec, str, str]:
    """The codec of what this end sends, ``dense`` bytes or ``packed``; why; the link's rate."""
    told = _swap(boundary, f"{dense} {packed} {_typical(received.seconds)}").split()
    sizes = [(dense, packed), (int(told[0]), int(told[1]))]
    nothing = (Dense(), "nothing to leave out")
    # The larger of both directions, which so take the same time at both ends.
    part = max((part for whole, part in sizes if part < whole), default=None)
    if part is None:
        return *nothing, ""
    whole = max(whole for whole, _ in sizes)
    all_take, zeros_take = _seconds(boundary, whole, part)
    zeros_take += _typical(sent.seconds) + float(told[2])  # what both sides compute
    rate = f"; {whole / all_take / 1e6:,.0f} MB/s"
    if packed >= dense:
        return *nothing, rate
    zeros, every = f"zeros: {zeros_take * 1e3:.2f} ms", f"all: {all_take * 1e3:.2f} ms"
    if zeros_take >= all_take:
        return Dense(), f"{every}, without {zeros}", rate
    return Zeros(), f"without {zeros}, {every}", rate


def _said(way: str, text: str, channels: Channels | None) -> str:
    """Of how many bytes: those before channels were left out."""
    _, dense, rest = text.split(" ", 2)
    whole = int(dense) if channels is None else round(int(dense) / channels.density)
    return f"{way} {rest.format(whole)}"


def _swap(boundary: Boundary, text: str) -> str:
    """The neighbour's text for this end's."""
    boundary.send([torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)], _PING)
    (received,) = boundary.receive(_PING)
    assert received is not None
    boundary.take_traffic()
    return received.numpy().tobytes().decode()


def _typical(seconds: Sequence[float]) -> float:
    """Of a message, not counting the first one's start where there are several."""
    return median_low(seconds) if seconds else 0.0


def _seconds(boundary: Boundary, whole: int, part: int) -> tuple[float, float]:
    """Until so many bytes have come, if as many go the other way at once, as in a step.

    Returns:
        Of ``whole`` bytes as frameworks send them, and of ``part`` in a message, in turns: the
        lower quartiles, as TCP's pacing (BBR's, say) has some take ten times as long, in phases.
    """

    def message(size: int) -> None:
        boundary.send([torch.empty(size, dtype=torch.uint8)], _PING)
        boundary.receive(_PING)

    ways = [(boundary.exchange_plain, whole), (message, part)]
    found: list[list[float]] = [[], []]
    for turn in range(1 + _TURNS):
        for (exchange, size), times in zip(ways, found, strict=True):
            untimed = max(min(-(-_BURST // max(size, 1)), _UNTIMED), 1)
            for _ in range(untimed if turn == 0 else min(untimed, _TIMED)):
                start = time.perf_counter()
                exchange(size)
                if turn > 0:
                    times.append(time.perf_counter() - start)
    boundary.take_traffic()
    plain, within = (sorted(times)[len(times) // 4] for times in found)
    return plain, within
