"""Named spans of a step's phases, which profilers show."""

from __future__ import annotations

import functools

from sparse_comm.reduce.span import span as _span

__all__ = ["span"]

span = functools.partial(_span, room="axonn")
