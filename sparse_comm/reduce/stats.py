"""What reductions cost: steps told apart, times taken, and figures made of them.

A *step* is one backward pass. It is told by the buckets: one that comes again, after the backward
pass of its last time has ended, starts the next. (DDP's last bucket may be skipped, several models
may share a backward pass, and reentrant checkpointing nests several, so nothing simpler holds.)
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import Variable

from sparse_comm import kernels

__all__ = ["Record", "Recorder", "union_length"]

_WINDOW = 1000  # steps over which medians are taken
FIGURES = ("bytes_dense", "bytes_sent", "collectives", "pack_s", "wire_s", "exposed_s")


@dataclass
class Record:
    """One bucket of one step. Times are of ``time.perf_counter``.

    Attributes:
        key: tells the buckets of one backward pass of one model apart.
        blocks: whether the caller waits for the collective.
        handed_over: when the bucket was ready to be reduced.
        start: when its collective started, None if there was none.
        end: when that completed.
    """

    key: Hashable
    dtype: torch.dtype
    on_cpu: bool
    bytes_dense: int | None
    bytes_sent: int | None
    collectives: int | None
    blocks: bool = False
    handed_over: float = field(default_factory=time.perf_counter)
    start: float | None = None
    end: float | None = None

    def sent(self) -> None:
        """The collective starts."""
        self.start = time.perf_counter()

    def completed(self) -> None:
        """The bucket is reduced."""
        self.end = time.perf_counter()

    def wire(self) -> tuple[float, float]:
        """When the bucket was under way."""
        assert self.end is not None
        return self.end if self.start is None else self.start, self.end

    def figures(self) -> dict[str, Any]:
        """The bucket's entry in ``stats()["buckets"]``."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes_dense": self.bytes_dense,
            "bytes_sent": self.bytes_sent,
            "collectives": self.collectives,
            "wire_s": union_length([self.wire()]) if self.on_cpu else None,
        }


@dataclass
class _Step:
    records: list[Record] = field(default_factory=list)
    keys: set[Hashable] = field(default_factory=set)  # theirs
    tasks: set[int] = field(default_factory=set)  # backward passes that it saw
    open_tasks: int = 0  # of those, how many have not ended
    end: float | None = None
    pack_s: float = 0.0

    def figures(self) -> dict[str, Any]:
        records = self.records
        sums = {key: _sum(getattr(r, key) for r in records) for key in FIGURES[:3]}
        wire_s = exposed_s = None
        if all(r.on_cpu for r in records):
            wire_s = union_length(r.wire() for r in records)
            last = max(r.handed_over for r in records)
            end = self.end or max(r.wire()[1] for r in records)
            blocked = [r.wire() for r in records if r.blocks]
            exposed_s = union_length([*blocked, (last, end)])
        return {**sums, "pack_s": self.pack_s, "wire_s": wire_s, "exposed_s": exposed_s}


class Recorder:
    """Keeps the figures of one Reduction, on one rank."""

    def __init__(self) -> None:
        self.reset()
        # Not the bound method itself: the list of observers would keep this object for ever.
        packed = weakref.WeakMethod(self._packed)

        def on_kernel(name: str, seconds: float) -> None:
            if name == "pack" and (note := packed()) is not None:
                note(seconds)

        weakref.finalize(self, kernels.observe(on_kernel))

    def reset(self) -> None:
        """Forget all figures."""
        self._step: _Step | None = None
        self._pack_s = 0.0
        self._count = 0
        self._recent: deque[dict[str, Any]] = deque(maxlen=_WINDOW)
        self._total: dict[str, Any] = dict.fromkeys(FIGURES, 0)
        self._buckets: list[dict[str, Any]] = []

    def handed_over(self, key: Hashable, **facts: Any) -> Record:
        """A bucket is about to be reduced.

        Args:
            key: tells the buckets of one backward pass of one model apart.
            **facts: further fields of Record.

        Returns:
            Its record, whose ``completed()`` is due when it is reduced.
        """
        task = torch._C._current_graph_task_id()  # -1 outside backward, as in ddp.join()
        step = self._step
        again = step is not None and key in step.keys
        if step is None or (again and not (step.open_tasks and task in step.tasks)):
            self._finish()
            step = self._step = _Step()
        if task != -1 and task not in step.tasks:
            step.tasks.add(task)
            step.open_tasks += 1
            _at_end_of_backward(lambda: self._backward_ended(step))
        record = Record(key, **facts)
        step.records.append(record)
        step.keys.add(key)
        return record

    def waited(self) -> None:
        """Until now, the step has waited for its collectives; for those who wait after backward."""
        if self._step is not None:
            self._step.end = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """What ``Reduction.stats()`` returns."""
        self._finish()
        return {
            "steps": self._count,
            **{key: _median(step[key] for step in self._recent) for key in FIGURES},
            "buckets": [dict(bucket) for bucket in self._buckets],
            "total": dict(self._total),
        }

    def _packed(self, seconds: float) -> None:
        if torch._C._current_graph_task_id() != -1:
            self._pack_s += seconds

    def _backward_ended(self, step: _Step) -> None:
        step.end = time.perf_counter()
        step.open_tasks -= 1
        if step is self._step:
            step.pack_s += self._pack_s
            self._pack_s = 0.0

    def _finish(self) -> None:
        """Count the step, unless it goes on, or broke off."""
        step = self._step
        if step is None or step.open_tasks or any(r.end is None for r in step.records):
            return
        self._step = None
        figures = step.figures()
        self._count += 1
        self._recent.append(figures)
        self._total = {key: _sum([self._total[key], figures[key]]) for key in FIGURES}
        self._buckets = [record.figures() for record in step.records]


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals, each given as (start, end)."""
    length = 0.0
    reached = float("-inf")
    for start, end in sorted(intervals):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _at_end_of_backward(call: Callable[[], None]) -> None:
    """Call it after the framework's own work at the end of this backward pass.

    A framework queues its work when the last gradient is ready: after this, but before what is
    queued when the queue is worked off.
    """
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(call))


def _sum(values: Iterable[Any]) -> Any:
    known = list(values)
    return None if any(value is None for value in known) else sum(known)


def _median(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
