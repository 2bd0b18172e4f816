"""Masks across ranks: give every rank the same ones, and notice where they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_comm.kernels import unpack_bits
from sparse_comm.masks import patterns_from_masks

__all__ = ["broadcast_masks", "compare_digests", "gather", "on_all_ranks"]

Result = TypeVar("Result")

_LISTED = 5  # parameters named in an error


def broadcast_masks(
    masks: Mapping[str, Tensor] | None, src: int = 0, group: dist.ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Give every rank the masks of rank ``src``. A collective: all ranks of the group call it.

    One bit an entry goes over the wire. Without an initialized process group, or in a group of
    one, the masks come back as they are.

    Args:
        masks: bool tensors by name. What ranks other than ``src`` pass is not looked at.
        src: the global rank whose masks count, as in ``torch.distributed.broadcast``.
        group: process group; the default one if not given.

    Returns:
        The masks of ``src``, names in the same order: on ``src`` the tensors that were passed, on
        the other ranks new ones, on the CPU.

    Raises:
        TypeError: the masks on ``src`` are not a mapping of strings to bool tensors.
        ValueError: the same, on the other ranks, so that none waits in vain; or this rank or
            ``src`` is not in the group.

    Source: ours.
    """
    if _world_size(group) == 1:
        patterns_from_masks(masks)  # type: ignore[arg-type]  # refuses None, by name
        return dict(masks)  # type: ignore[arg-type]
    if src not in (members := dist.get_process_group_ranks(group)):
        raise ValueError(f"src is global rank {src}, but the group has {_ranks(members)}")
    header: list[Any] = [None]
    bits = torch.empty(0, dtype=torch.uint8)
    failure: Exception | None = None
    is_source = dist.get_rank() == src
    if is_source:
        try:
            patterns = patterns_from_masks(masks)  # type: ignore[arg-type]
            header = [[(name, tuple(pattern.shape)) for name, pattern in patterns.items()]]
            bits = torch.cat([bits, *(pattern.bitmap for pattern in patterns.values())])
        except Exception as error:
            failure, header = error, [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(header, src=src, group=group)
    if failure is not None:
        raise failure
    if isinstance(header[0], str):
        raise ValueError(f"rank {src} has no masks to broadcast: {header[0]}")
    sizes = [-(-math.prod(shape) // 64) * 8 for _, shape in header[0]]
    wire = bits if is_source else torch.empty(sum(sizes), dtype=torch.uint8)
    wire = wire.to(_wire_device(group))
    if wire.numel():
        dist.broadcast(wire, src=src, group=group)
    if is_source:
        return dict(masks)  # type: ignore[arg-type]
    parts = wire.cpu().split(sizes)
    return {
        name: unpack_bits(part, 0, math.prod(shape)).reshape(shape)
        for (name, shape), part in zip(header[0], parts, strict=True)
    }


def compare_digests(
    digests: Mapping[str, str | None],
    group: dist.ProcessGroup | None = None,
    partial: bool = False,
    advice: str = "call sparse_comm.broadcast_masks(masks) before compact",
) -> None:
    """Stop every rank if the ranks' patterns differ. A collective: all ranks of the group call it.

    Without an initialized process group, or in a group of one, there is nothing to compare.

    Args:
        digests: ``SparsityPattern.digest()`` by parameter name; None for one without a mask.
        group: process group; the default one if not given.
        partial: whether ranks hold parts of the model, such as pipeline stages: a name that a rank
            does not give is then not there, where it would else be without a mask.
        advice: what to do about a difference.

    Raises:
        ValueError: on every rank, with the same message, which names parameters and global ranks;
            or this rank is not in the group.

    Source: ours.
    """
    gathered = gather(dict(digests), group)
    if len(gathered) == 1:
        return
    ranks = dist.get_process_group_ranks(group)
    names = {name: None for known in gathered for name in known}  # a set that keeps its order
    differences = []
    for name in names:
        holders = [rank for rank in range(len(ranks)) if not partial or name in gathered[rank]]
        given = [gathered[rank].get(name) for rank in holders]
        if text := _difference(name, given, [ranks[rank] for rank in holders]):
            differences.append(text)
    if differences:
        rest = len(differences) - _LISTED
        more = f"; and {rest} more parameters" if rest > 0 else ""
        raise ValueError(
            f"masks differ between ranks: {'; '.join(differences[:_LISTED])}{more}. Give every "
            f"rank the same masks: {advice}"
        )


def gather(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What each rank gives, in the order of the ranks; what can be pickled. A collective."""
    if (world_size := _world_size(group)) == 1:
        return [mine]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, mine, group=group)
    return gathered


def on_all_ranks(function: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """What ``function()`` gives, once no rank has failed at it. A collective.

    Where one rank alone would raise, and leave the others waiting for it, all raise.

    Args:
        function: takes part in no collective, or fails on all ranks alike.
        group: process group; the default one if not given.

    Raises:
        Exception: of ``function``, on the ranks where it failed.
        RuntimeError: on the others, with the ranks and the message of the first.

    Source: ours.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    said = gather(None if failure is None else f"{type(failure).__name__}: {failure}", group)
    if failure is not None:
        raise failure
    if any(said):
        ranks = dist.get_process_group_ranks(group)
        failed = [rank for rank, text in zip(ranks, said, strict=True) if text]
        raise RuntimeError(f"{_ranks(failed)} failed: {next(filter(None, said))}")
    return result  # type: ignore[return-value]


def _difference(name: str, digests: Sequence[str | None], ranks: Sequence[int]) -> str:
    """What is different about one parameter; empty if nothing is."""
    with_digest: dict[str, list[int]] = {}
    without = []
    for rank, digest in zip(ranks, digests, strict=True):
        if digest is None:
            without.append(rank)
        else:
            with_digest.setdefault(digest, []).append(rank)
    if not with_digest:
        return ""
    first, *others = with_digest.values()
    clauses = [f"masked differently on {_ranks(o)} than on {_ranks(first)}" for o in others]
    if without:
        masked = sorted(rank for group in with_digest.values() for rank in group)
        clauses.append(f"masked on {_ranks(masked)} but not on {_ranks(without)}")
    return f"{name!r} is {' and '.join(clauses)}" if clauses else ""


def _ranks(ranks: Sequence[int]) -> str:
    """For example ``rank 3`` or ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"


def _world_size(group: dist.ProcessGroup | None) -> int:
    if not dist.is_available() or not dist.is_initialized():
        return 1
    if dist.get_rank(group) < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the process group that was given")
    return dist.get_world_size(group)


def _wire_device(group: dist.ProcessGroup | None) -> str:
    """The device type that the group's backend takes: the CPU if it can."""
    devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]
