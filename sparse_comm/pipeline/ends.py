"""Both ends of a stage: what is agreed with its neighbours, and which codec each boundary gets.

Every engine does the same: it describes its stages, all ranks compare the descriptions (so that
all stop if one does not fit), and each stage puts in its modules and sets its codecs. ``auto``
sends the first step's messages with zeros left out, looks at what that saved and cost and how fast
the link is, and keeps that, or goes dense.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparse_comm.compact import is_compact, masks_of
from sparse_comm.compact.module import compact_slots
from sparse_comm.pattern import SparsityPattern

from .boundary import Boundary, Traffic
from .channels import Channels, insert, plan_channels, sides_of
from .codec import Codec
from .dense import Dense
from .layers import Side
from .zeros import Zeros

__all__ = ["CODECS", "Description", "Ends", "check_codec", "compare", "describe", "has_messages"]

CODECS = ("auto", "channels", "dense", "zeros")
_PING = (1 << 32) - 1  # the number of no micro-batch
_LEAST = 1 << 12  # bytes of a ping
_BURST = 1 << 21  # bytes that are sent at once, more than a link lets through at first


@dataclass(frozen=True)
class Description:
    """What a stage tells all others before the first message.

    Attributes:
        index: of the stage.
        codec: the name that was asked for.
        checksum: whether messages have one.
        reads: of the channels of the boundary before it; None: all.
        writes: to those of the boundary behind it; None: all.
    """

    index: int
    codec: str
    checksum: bool
    reads: Side | None
    writes: Side | None


def check_codec(codec: str | Codec) -> None:
    """Refuse what is no codec.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(codec, str) and codec not in CODECS:
        raise ValueError(
            f"pipeline_codec must be one of {', '.join(map(repr, CODECS))}, got {codec!r}"
        )


def has_messages(codec: str | Codec, device: torch.device | str, backend: str = "gloo") -> bool:
    """Whether a codec has messages of its own, in place of the framework's.

    Args:
        codec: that was asked for.
        device: of the stage.
        backend: of the process group, of which CPU tensors are sent.

    Raises:
        ValueError: it needs them, and they cannot be had. ("auto" can do without.)
    """
    if codec in ("dense", "channels"):
        return False
    kind = torch.device(device).type
    if kind == "cpu" and backend == "gloo":
        return True
    if codec == "auto":
        return False
    name = codec if isinstance(codec, str) else codec.name
    raise ValueError(
        f"pipeline_codec={name!r} sends messages of changing size, which needs stages on CPUs and "
        f"gloo; here are {kind} and {backend}: 'channels' and 'dense' work, and 'auto' is "
        "'channels' then"
    )


def describe(
    index: int,
    stage: nn.Module,
    codec: str | Codec,
    *,
    checksum: bool = False,
) -> Description:
    """The description of a stage.

    Args:
        index: of the stage in the pipeline.
        stage: its module.
        codec: that was asked for.
        checksum: whether messages have one.

    Raises:
        ValueError: an unknown codec.
    """
    check_codec(codec)
    reads = writes = None
    # Of dense stages the gradients of pruned weights are looked at: clipping, regrowth.
    if codec in ("auto", "channels") and is_compact(stage):
        reads, writes = sides_of(stage, masks_of(stage))
    name = codec if isinstance(codec, str) else codec.name
    return Description(index, name, checksum, reads, writes)


def compare(
    described: Sequence[Description], count: int | None = None
) -> dict[int, Channels | None]:
    """Check that neighbours fit, and plan the channels between them. The same on every rank.

    Args:
        described: all stages of the pipeline, in any order; replicas of a stage may come, too.
        count: of the stages, if some may be missing.

    Returns:
        The channels of the boundary behind each stage but the last.

    Raises:
        ValueError: naming the boundary: neighbours have different codecs, or replicas masks; or
            stages are missing.
    """
    stages: dict[int, Description] = {}
    for one in described:
        known = stages.setdefault(one.index, one)
        if not _alike(known, one):
            raise ValueError(
                f"replicas of stage {one.index} have different masks next to its boundaries, or "
                f"codecs ({known.codec!r} and {one.codec!r}): give all replicas the same"
            )
    if missing := sorted({*range(count or len(stages))} - stages.keys()):
        names = ", ".join(map(str, missing))
        raise ValueError(
            f"stages {names} of {count or len(stages)} are missing: give all stages of a rank in "
            "one call, and call it on all ranks of the pipeline"
        )
    planned = {}
    for index in sorted(stages)[:-1]:
        writer, reader = stages[index], stages[index + 1]
        if (writer.codec, writer.checksum) != (reader.codec, reader.checksum):
            raise ValueError(
                f"the boundary between stages {index} and {index + 1}: stage {index} has "
                f"pipeline_codec={writer.codec!r}, checksum={writer.checksum}; stage {index + 1} "
                f"{reader.codec!r}, {reader.checksum}: give all stages the same"
            )
        planned[index] = plan_channels(writer.writes, reader.reads)
    return planned


def _alike(one: Description, other: Description) -> bool:
    if (one.codec, one.checksum) != (other.codec, other.checksum):
        return False
    for a, b in ((one.reads, other.reads), (one.writes, other.writes)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not torch.equal(a.needed, b.needed):
            return False
    return True


def _patterns(stage: nn.Module, description: Description) -> dict[str, SparsityPattern]:
    """Of the compact layers that decide which channels are sent, by parameter."""
    sides = [side for side in (description.reads, description.writes) if side is not None]
    layers = {side.layer for side in sides}
    return {
        name: slot.pattern
        for name, _, _, slot in compact_slots(stage)
        if name.rpartition(".")[0] in layers
    }


class Ends:
    """A stage's modules and codecs at its boundaries, after ``compare``.

    Args:
        stage: its module, in which ``Restore`` and ``Keep`` are put, as hooks.
        description: of ``describe``.
        planned: of ``compare``.
        codec: that was asked for.
        before: this end of the boundary before the stage; None if it is the first, or if the
            framework's own messages are used.
        behind: of the boundary behind it.
        logs: whether this rank prints what ``auto`` decides.
    """

    def __init__(
        self,
        stage: nn.Module,
        description: Description,
        planned: Mapping[int, Channels | None],
        codec: str | Codec,
        before: Boundary | None,
        behind: Boundary | None,
        logs: bool = True,
    ) -> None:
        self.stage, self.description, self.codec = stage, description, codec
        self.before, self.behind = before, behind
        self.channels = planned.get(description.index - 1), planned.get(description.index)
        self._logs = logs
        self._patterns = _patterns(stage, description)
        self._handles = insert(stage, *self.channels)
        self._undecided = {"before", "behind"} if codec == "auto" else set()

    def begin_step(self) -> None:
        """To be called before the first message of a step, on every stage.

        Raises:
            RuntimeError: masks next to a boundary are others than those that were agreed on.
        """
        self._check_masks()
        for boundary in (self.before, self.behind):
            if boundary is not None:
                boundary.forget()
        for which, is_writer in (("before", False), ("behind", True)):
            boundary = getattr(self, which)
            # At both ends after the first step that trained: evaluations send activations only.
            if which in self._undecided and boundary is not None and boundary.is_measured:
                self._undecided.remove(which)
                self._decide(which, boundary, is_writer)

    def end_step(self) -> None:
        """Wait until what the step has sent has left."""
        for boundary in (self.before, self.behind):
            if boundary is not None:
                boundary.flush()

    def remove(self) -> None:
        """Take the modules out again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _check_masks(self) -> None:
        if not self._patterns:
            return
        now = _patterns(self.stage, self.description)
        if any(now.get(name) is not pattern for name, pattern in self._patterns.items()):
            raise RuntimeError(
                f"the masks next to a boundary of stage {self.description.index} have changed "
                "since its sends were planned: plan them anew, on all ranks, after update_masks"
            )

    # ---------------------------------------------------------------- auto

    def _decide(self, which: str, boundary: Boundary, is_writer: bool) -> None:
        """Set the codec; a boundary over which both ends go dense is the framework's again."""
        sent, _ = boundary.take_traffic()
        rate = _rate(boundary, sent)
        boundary.codec, why = _better(sent, rate)
        each = max(sent.messages, 1)
        sends = sent.sent if isinstance(boundary.codec, Zeros) else sent.dense
        name = boundary.codec.name
        mine = f"{sent.dense // each} {name}, {sends / each:,.0f} of {{:,}} bytes ({why})"
        theirs = _swap(boundary, mine)
        if is_writer and self._logs:
            self._log(boundary.name, mine, theirs, rate)
        if name == "dense" and theirs.split()[1] == "dense,":
            boundary.flush()
            setattr(self, which, None)

    def _log(self, name: str, activations: str, gradients: str, rate: float) -> None:
        channels = self.channels[1]
        planned = f"{channels.why}; " if channels is not None else ""
        ways = {"activations": activations, "gradients": gradients}
        said = "; ".join(_said(way, text, channels) for way, text in ways.items())
        print(
            f"sparse_comm: {name}, a micro-batch: {planned}{said}; {rate / 1e6:,.0f} MB/s",
            flush=True,
        )


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
    count = -(-_BURST // size)
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
