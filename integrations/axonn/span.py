"""Named spans of a step's phases, which profilers show."""

from __future__ import annotations

from typing import Any

from sparse_comm.reduce.span import record

__all__ = ["span"]


def span(phase: str) -> Any:
    """A context manager that profilers show as ``sparse_comm::axonn.<phase>``."""
    return record(f"sparse_comm::axonn.{phase}")
