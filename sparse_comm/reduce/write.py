"""Figures into the monitor that the user has: a log, TensorBoard, W&B, or a function."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Writer", "write"]


class _TensorBoard(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> Any: ...


class _WandB(Protocol):
    # positional or by name, further arguments: whatever W&B's releases take
    log: Callable[..., Any]


Writer = logging.Logger | _TensorBoard | _WandB | Callable[[dict[str, Any], int], Any]


def write(figures: dict[str, Any], writer: Any, step: int) -> None:
    """Give ``figures``, those of ``Reduction.stats()``, to ``writer``; see ``write_stats``."""
    if isinstance(writer, logging.Logger | logging.LoggerAdapter):
        writer.info("%s", _line(figures, step))
    elif hasattr(writer, "add_scalar"):
        for name, value in _scalars(figures).items():
            writer.add_scalar(name, value, step)
    elif hasattr(writer, "log"):
        writer.log(_scalars(figures), step=step)
    elif callable(writer):
        writer(figures, step)
    else:
        raise TypeError(
            "write_stats takes a logging.Logger, a SummaryWriter (add_scalar), a W&B run (log) or "
            f"a callable (figures, step), got {type(writer).__name__}"
        )


def _scalars(figures: dict[str, Any], prefix: str = "sparse_comm/") -> dict[str, float]:
    """Those figures that are known, by name; each bucket's stay in ``stats()``."""
    scalars: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, dict):
            scalars |= _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            scalars[prefix + name] = value
    return scalars


def _line(figures: dict[str, Any], step: int) -> str:
    parts = [f"sparse_comm at step {step}: {figures['steps']} steps reduced, a step"]
    sent, dense = figures["bytes_sent"], figures["bytes_dense"]
    if sent is not None:
        parts.append(f"{sent / 1e6:.3f} MB sent in {figures['collectives']:g} collectives,")
    if dense is not None:
        parts.append(f"{dense / 1e6:.3f} MB if dense,")
    for name in ("pack_s", "wire_s", "exposed_s"):
        if figures[name] is not None:
            parts.append(f"{name.removesuffix('_s')} {figures[name] * 1e3:.1f} ms,")
    return " ".join(parts).rstrip(",")
