"""AxoNN 0.2.0's defects in its layers, mended by other names in its modules, while a context lasts.

The engine's and the transports' defects are met where those are (engine.py, transport.py). The page
docs/axonn-defects.md lists all, each with a program that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from . import modules

__all__ = ["mended"]


@contextmanager
def mended() -> Iterator[None]:
    """In here, AxoNN's layers compute the gradients that the unsharded layers have.

    - ``Linear``'s bias is gathered from shards that belong to different parts of the batch: its
      gradient is summed over them, where AxoNN takes that of its own part.
    - ``Conv2d`` finds the flag that it looks for in a module that does not have it.
    - Weights gathered over depths count as written to no more, so that several micro-batches may go
      forward before the first goes backward.
    """
    gather = modules.intra_communication.ForwardGather_BackwardReduceScatter
    original = modules.intra_communication._gather

    def gather_parts(input_: Any, dim: int, process_group: Any = None, cache: bool = False) -> Any:
        count = dist.get_world_size(process_group)
        if count == 1 or cache or input_ in modules.overlap_communication.weights_cache:
            return original(input_, dim, process_group, cache)
        own = input_.contiguous()
        parts = [torch.empty(own.shape, dtype=own.dtype, device=own.device) for _ in range(count)]
        dist.all_gather(parts, own, group=process_group)  # AxoNN's list of outputs holds the input
        return torch.cat(parts, dim=dim)

    flag = _bound(modules.intra_layer, "OVERLAP_REDUCE_SCATTER", False)
    with (
        flag,
        _bound(modules.fully_connected, "Gather", gather),
        _bound(modules.fully_connected, "_gather", gather_parts),
        _bound(modules.intra_communication, "_gather", gather_parts),
    ):
        yield


@contextmanager
def _bound(module: Any, name: str, value: Any) -> Iterator[None]:
    there = name in vars(module)
    before = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if there:
            setattr(module, name, before)
        else:
            delattr(module, name)
