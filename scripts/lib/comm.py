"""Measures DDP's communication through its public seam, the communication hook."""

import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sparse_comm.reduce import Reduction, reduce_hook
from sparse_comm.reduce.stats import union_length


class CommRecorder:
    """All-reduces buckets as DDP does by default, and notes when each began and ended.

    Given a ``dtype``, they travel in that.

    *Communication time* of a step is the time during which at least one bucket is under way: the
    length of the union of the intervals [hook called, all-reduce complete]. Overlapping buckets
    count once.

    *Exposed communication time* is what the step waits for: from the last call of the hook to the
    end of ``loss.backward()``. DDP hands over its last bucket when the last gradient is ready,
    so from then on backward has nothing left to compute: it waits for the network and finishes
    DDP's own work. That work makes the exposed time of a fast link exceed its communication time.

    On CPUs gloo's threads run on the cores that compute, so communication that is not exposed
    still slows the computation that it hides behind. Neither time shows that; the step time does.

    Example::

        recorder = CommRecorder(ddp_model)
        loss = ddp_model(inputs)
        recorder.start_step()
        loss.backward()
        communication, exposed = recorder.end_step()
    """

    # No `from __future__ import annotations` in this file: DDP compares the hook's annotations
    # with the classes and refuses their names.

    def __init__(self, model: DistributedDataParallel, dtype: torch.dtype | None = None) -> None:
        self._world_size = dist.get_world_size()
        self._issued: list[float] = []
        self._intervals: list[tuple[float, float]] = []
        if dtype is None:
            model.register_comm_hook(None, self._hook)
        else:
            model.register_comm_hook(Reduction(dtype, hook=(None, self._hook)), reduce_hook)

    def start_step(self) -> None:
        self._issued.clear()
        self._intervals.clear()

    def end_step(self) -> tuple[float, float]:
        """Call right after ``backward``; returns (communication, exposed communication), in s."""
        backward_end = time.perf_counter()
        return union_length(self._intervals), backward_end - max(self._issued)

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        issued = time.perf_counter()
        self._issued.append(issued)
        gradients = bucket.buffer().div_(self._world_size)
        future = dist.all_reduce(gradients, async_op=True).get_future()

        def completed(future: torch.futures.Future) -> torch.Tensor:
            self._intervals.append((issued, time.perf_counter()))
            return future.value()[0]

        return future.then(completed)
