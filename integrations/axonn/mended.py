"""AxoNN 0.2.0's defects in its layers, mended by other names in its modules, while a context lasts.

The engine's and the transports' defects are met where those are (engine.py, transport.py). The page
docs/axonn.md lists all, each with a program that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import modules

__all__ = ["mended"]


@contextmanager
def mended() -> Iterator[None]:
    """In here, AxoNN's layers compute the gradients that the unsharded layers have.

    - ``Linear``'s bias is gathered from shards that belong to different parts of the batch: its
      gradient is summed over them, where AxoNN takes that of its own part.
    - ``Conv2d`` finds the flag that it looks for in a module that does not have it.
    """
    gather = modules.intra_communication.ForwardGather_BackwardReduceScatter
    flag = _bound(modules.intra_layer, "OVERLAP_REDUCE_SCATTER", False)
    with _bound(modules.fully_connected, "Gather", gather), flag:
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
