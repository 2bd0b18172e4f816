"""How fast the link between the ranks is, and the bucket size that follows from it."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Link", "bucket_cap_mb", "measure_link"]

_SIZES = (1 << 12, 1 << 18, 1 << 20)  # bytes of the messages
_REPEATS = 7
_BUDGET = 0.25  # seconds: no larger message once the smaller ones have taken as long
_LEAST, _MOST = 1 << 16, 25 << 20  # bytes a bucket; the most is DDP's default
_MIB = 1 << 20


@dataclass(frozen=True)
class Link:
    """An all-reduce of n bytes takes about ``latency_s + n / bytes_per_s``.

    Attributes:
        latency_s: seconds that a collective takes whatever its size.
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

    Takes some tenths of a second over 1 Gbit/s, less on faster links; on slow ones the larger
    sizes are left out. Times include what the CPUs do, as reductions of gradients will.

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
    _median_time(_SIZES[0], group, place, dtype)  # connections are made
    sizes: list[int] = []
    times: list[float] = []
    for size in _SIZES:
        sizes.append(size)
        times.append(_slowest(_median_time(size, group, place, dtype), group, place))
        if sum(times) * _REPEATS > _BUDGET:
            break
    latency, seconds_per_byte = _fit(sizes, times)
    # The same floats on all ranks, which may have unlike processors.
    latency = _slowest(latency, group, place)
    return Link(latency, 1 / _slowest(seconds_per_byte, group, place))


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


def _fit(sizes: list[int], times: list[float]) -> tuple[float, float]:
    """Latency and seconds a byte that fit the times with the least relative errors."""
    if len(sizes) == 1:
        return times[0] / 2, times[0] / 2 / sizes[0]
    design = torch.tensor([[1.0, size] for size in sizes], dtype=torch.float64)
    measured = torch.tensor(times, dtype=torch.float64)
    weighted = design / measured.unsqueeze(1)
    fit = torch.linalg.lstsq(weighted, torch.ones(len(sizes), 1, dtype=torch.float64))
    latency, seconds_per_byte = fit.solution.flatten().tolist()
    return max(latency, 1e-6), max(seconds_per_byte, 1e-12)


def _median_time(
    size: int, group: dist.ProcessGroup | None, device: torch.device, dtype: torch.dtype
) -> float:
    message = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    synchronize = torch.get_device_module(device).synchronize
    times = []
    for _ in range(_REPEATS):
        synchronize()
        start = time.perf_counter()
        dist.all_reduce(message, group=group)
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _slowest(value: float, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """The largest of the ranks' values."""
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.item()


def _device_of(group: dist.ProcessGroup | None) -> str:
    """The device type that the group's backend takes: the CPU if it can."""
    devices = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
    return "cpu" if "cpu" in devices else devices[0]
