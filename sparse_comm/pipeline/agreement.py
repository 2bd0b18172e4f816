"""What stages tell each other before the first message, and what follows from it on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from sparse_comm.compact import is_compact, masks_of

from .channels import Channels, plan_channels, sides_of
from .codec import Codec
from .layers import Side

__all__ = ["CODECS", "Description", "alike", "check_codec", "compare", "describe", "has_messages"]

CODECS = ("auto", "channels", "dense", "zeros")


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
        if not alike(known, one):
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


def alike(one: Description, other: Description) -> bool:
    """Whether they may be of replicas of a stage."""
    if (one.codec, one.checksum) != (other.codec, other.checksum):
        return False
    for a, b in ((one.reads, other.reads), (one.writes, other.writes)):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None and not torch.equal(a.needed, b.needed):
            return False
    return True
