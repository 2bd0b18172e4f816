"""How fast the link between the ranks is, and the bucket size that follows from it."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Link", "bucket_cap_mb", "measure_link"]

_SMALL = 1 << 12  # bytes of a message whose time is latency
_LARGE = (1 << 16, 1 << 18, 1 << 20)  # of messages whose time tells the rate
_IN_FLIGHT = 4  # of the large ones: as buckets are, and more than a shaped link lets burst
_PARTS = 8  # into which each large one is split, to see what that costs
_REPEATS = 5
_BUDGET = 0.25  # seconds; no larger message if one size has taken as long
_LEAST, _MOST = 1 << 16, 25 << 20  # bytes a bucket; the most is DDP's default
_MIB = 1 << 20


@dataclass(frozen=True)
class Link:
    """An all-reduce of n bytes takes about ``latency_s + n / bytes_per_s``.

    Attributes:
        latency_s: seconds that one more collective takes, whatever its size.
        bytes_per_s: bytes of a rank's buffer, not of the wire, that a second reduces.
    """

    latency_s: float
    bytes_per_s: float


def measure_link(
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Link:
    """Measure all-reduces of a few sizes. A collective: all ranks of the group call it.

    Takes some 0.5 s over 1 Gbit/s and less on faster links; on slow ones the largest size is left
    out. Times include what the CPUs do, as reductions of gradients will. So the latency is that of
    a small message alone, or, if it is more, what each collective adds where the same bytes are
    split into many: ranks that share few cores wait for their threads' turns (on a loopback of two
    cores, two milliseconds instead of a quarter).

    Args:
        group: process group; the default one if not given.
        device: where gradients are; where the group's backend works if not given.
        dtype: what gradients travel in.

    Returns:
        The slowest rank's link, the same on all ranks; without latency and infinitely fast for a
        group of one.

    Source: ours; the model is Hockney's (R. Hockney, Parallel Computing 20, 1994).
    """
    if dist.get_world_size(group) == 1:
        return Link(0.0, math.inf)
    place = torch.device(device or _device_of(group))

    def slowest_time(size: int, count: int) -> float:
        numel = size // dtype.itemsize
        messages = [torch.zeros(numel, dtype=dtype, device=place) for _ in range(count)]
        return _slowest(_median_time(messages, group), group, place)

    slowest_time(_SMALL, 1)  # connections are made
    latency = slowest_time(_SMALL, 1)
    for size in _LARGE:
        total = slowest_time(size, _IN_FLIGHT)
        if total * (_REPEATS + 1) > _BUDGET:
            break
    # Taken twice, as ranks that lose their core for a moment inflate short times many times over.
    latency = min(latency, slowest_time(_SMALL, 1))
    split = slowest_time(size // _PARTS, _IN_FLIGHT * _PARTS)
    return _link_of(latency, total, split, size)


def _link_of(alone: float, together: float, split: float, size: int) -> Link:
    """The link on which these were measured.

    Args:
        alone: seconds of one small message.
        together: of _IN_FLIGHT messages of ``size`` bytes.
        split: of the same bytes in _PARTS times as many messages.
        size: bytes.
    """
    rate = _IN_FLIGHT * size / max(together - alone, together / 2)
    added = (split - together) / (_IN_FLIGHT * (_PARTS - 1))
    return Link(max(alone, added), rate)


def bucket_cap_mb(link: Link, total_bytes: float) -> float:
    """The bucket size at which a step waits least for ``total_bytes`` of gradients.

    S bytes in buckets of B cost the latency a of S / B collectives, and the last bucket, which no
    computation is left to hide, costs B / r: a S / B + B / r is least at B = sqrt(a S r).

    Args:
        link: of ``measure_link``.
        total_bytes: of all gradients of a step, as they travel.

    Returns:
        Bytes of a bucket as it travels, in MiB, between 1/16 and 25 (DDP's default). DDP counts
        gradients in their own dtype: multiply by 2 for fp32 gradients that travel as bf16.

    Source: ours.
    """
    best = link.latency_s * total_bytes * link.bytes_per_s
    if not math.isfinite(best):
        return _MOST / _MIB
    return min(max(math.sqrt(best), _LEAST), _MOST) / _MIB


def _median_time(messages: list[torch.Tensor], group: dist.ProcessGroup | None) -> float:
    """Seconds in which the messages are reduced, all handed over at once."""
    synchronize = torch.get_device_module(messages[0].device).synchronize
    times = []
    for _ in range(1 + _REPEATS * (1 if len(messages) > 1 else 3)):
        synchronize()
        start = time.perf_counter()
        works = [dist.all_reduce(message, group=group, async_op=True) for message in messages]
        for work in works:
            work.wait()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first may find a shaped link idle, and burst


def _slowest(seconds: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """The largest of the ranks' times: the same float everywhere, so that all decide alike."""
    largest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.item()


def _device_of(group: dist.ProcessGroup | None) -> str:
    """The device type that the group's backend takes: the CPU if it can."""
    devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]
