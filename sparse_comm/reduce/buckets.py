"""``GradientBuckets``: gradients averaged in buckets, as the last of several backward passes goes.

DDP wraps a module whose every forward pass is followed by its backward pass. A pipeline stage has
several micro-batches under way, so that only whoever schedules them knows which backward pass is
the last of a step: it says so here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_comm.reduce.reduction import Reduction
from sparse_comm.reduce.span import span
from sparse_comm.reduce.stats import Record

__all__ = ["GradientBuckets", "Share"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Share:
    """How one parameter's gradient is averaged.

    Attributes:
        name: of the parameter, for messages.
        parameter: a leaf that requires grad.
        group: the ranks whose gradients are summed.
        divisor: by what each rank's gradient is divided before; more than the group's ranks where
            gradients are sums over other ranks already.
    """

    name: str
    parameter: nn.Parameter
    group: dist.ProcessGroup | None
    divisor: int


@dataclass
class _Bucket:
    """Parameters whose gradients travel together.

    Attributes:
        buffer: what travels: the gradients, then one number a parameter, not 0 where a rank has a
            gradient at all; None if nothing does.
        views: the gradients' places in it, each of its parameter's shape.
        waiting: how many parameters have no complete gradient in this backward pass yet.
    """

    shares: list[Share]
    bytes_dense: int | None
    buffer: Tensor | None = None
    views: list[Tensor] = field(default_factory=list)
    waiting: int = 0
    launched: bool = False
    work: Any = None
    record: Record | None = None


class GradientBuckets:
    """Averages gradients over ranks, in buckets, while the last backward pass of a step goes on.

    A bucket is reduced when all its gradients are complete, after those before it: parameters that
    come last in the model, whose gradients are complete first, are in the first bucket. What is
    unused on this rank counts as zero there; what is unused on all keeps no gradient. Losses are
    the same, bit for bit, with and without overlap.

    Example::

        buckets = GradientBuckets(shares, Reduction(torch.bfloat16))
        for number, micro_batch in enumerate(micro_batches):
            loss = …
            with buckets.backward(last=number + 1 == len(micro_batches)):
                loss.backward()
        buckets.wait()
        optimizer.step()

    Args:
        shares: how each parameter is averaged; the same ones on all ranks, in the same order.
        reduction: in what dtype gradients travel, and whether figures are kept. Its process group
            and hook are not looked at.
        bucket_cap_mb: MiB of a bucket as it travels.
        overlap: whether buckets are reduced while backward goes on, or all after it.

    Raises:
        ValueError: a parameter that is there twice, or a bucket of no size.

    Source: ours; the order is that of torch's DDP (Li et al., VLDB 2020, section 3.2.3).
    """

    def __init__(
        self,
        shares: Sequence[Share],
        reduction: Reduction,
        bucket_cap_mb: float = 1.0,
        overlap: bool = True,
    ) -> None:
        if bucket_cap_mb <= 0:
            raise ValueError(f"bucket_cap_mb must be more than 0, got {bucket_cap_mb}")
        if len({id(share.parameter) for share in shares}) < len(shares):
            raise ValueError("a parameter is given twice; tied ones count as one")
        self.reduction = reduction
        self.overlap = overlap
        self._buckets = list(self._filled(reversed(shares), bucket_cap_mb * _MIB))
        self._bucket_of = {
            id(share.parameter): bucket for bucket in self._buckets for share in bucket.shares
        }
        self._names = {id(share.parameter): share.name for share in shares}
        self._next = 0  # bucket to be reduced
        self._last = False  # whether this backward pass is the last
        # How often each parameter's gradient grows in a backward pass: more than once where
        # reentrant checkpointing runs passes inside the pass.
        self._seen: Counter[int] = Counter()
        self._expected: Counter[int] = Counter()
        grown = weakref.WeakMethod(self._grown)

        def on_gradient(parameter: Tensor) -> None:
            if (note := grown()) is not None:
                note(parameter)

        for share in shares:
            handle = share.parameter.register_post_accumulate_grad_hook(on_gradient)
            weakref.finalize(self, handle.remove)

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around each backward pass of a step.

        Args:
            last: whether no other follows before the optimizer's step: gradients are then reduced.
        """
        self._seen.clear()
        self._last = last
        if last:
            self._start()
        try:
            yield
        finally:
            self._last = False
        self._expected = self._seen.copy()
        if last:
            self._launch_all()

    def reduce(self) -> None:
        """Start to average gradients as they are, after backward passes of which none was last."""
        self._start()
        self._launch_all()

    def wait(self) -> None:
        """Until all gradients are averages; they are then in ``parameter.grad``."""
        with span("wait"):
            for bucket in self._buckets:
                if bucket.work is not None:
                    bucket.work.wait()
        if self.reduction.recorder is not None:
            self.reduction.recorder.waited()
        with span("decompress"):
            for bucket in self._buckets:
                if bucket.work is not None:
                    _write_back(bucket)
                    bucket.work = bucket.record = None

    # ---------------------------------------------------------------- while backward goes on

    def _grown(self, parameter: Tensor) -> None:
        """A parameter's gradient has been added to."""
        key = id(parameter)
        self._seen[key] += 1
        if not self._last or not self.overlap:
            return
        bucket = self._bucket_of[key]
        if bucket.launched:
            raise RuntimeError(
                f"the gradient of {self._names[key]!r} grew after it was sent to be averaged: in "
                "earlier backward passes it was complete by then. Give overlap=False to models "
                "that use their parameters differently from one micro-batch to the next"
            )
        # Before a first pass has shown how often it grows, only the end of the pass is sure.
        if self._seen[key] == self._expected[key]:
            bucket.waiting -= 1
        while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
            self._launch_next()

    def _start(self) -> None:
        self._next = 0
        for bucket in self._buckets:
            bucket.launched = False
            bucket.waiting = len(bucket.shares)

    def _launch_all(self) -> None:
        while self._next < len(self._buckets):
            self._launch_next()

    def _launch_next(self) -> None:
        """Start to reduce the next bucket."""
        number, bucket = self._next, self._buckets[self._next]
        self._next += 1
        bucket.launched = True
        group, divisor = bucket.shares[0].group, bucket.shares[0].divisor
        gradients = [s.parameter.grad for s in bucket.shares if s.parameter.grad is not None]
        with span("compress"):
            if divisor > 1 and gradients:
                torch._foreach_div_(gradients, divisor)
            if bucket.buffer is not None:
                _fill(bucket, bucket.buffer)
        if self.reduction.recorder is not None:
            bucket.record = self._record(number, bucket)
        if bucket.buffer is None:
            return
        with span("all_reduce"):
            bucket.work = dist.all_reduce(bucket.buffer, group=group, async_op=True)
            if (record := bucket.record) is not None:
                bucket.work = bucket.work.get_future().then(_noting(record))

    def _record(self, number: int, bucket: _Bucket) -> Record:
        assert self.reduction.recorder is not None
        parameter, buffer = bucket.shares[0].parameter, bucket.buffer
        record = self.reduction.recorder.handed_over(
            (id(self), number),
            dtype=parameter.dtype if buffer is None else buffer.dtype,
            on_cpu=parameter.device.type == "cpu",
            bytes_dense=bucket.bytes_dense,
            bytes_sent=0 if buffer is None else buffer.nbytes,
            collectives=int(buffer is not None),
        )
        if buffer is None:
            record.completed()
        else:
            record.sent()
        return record

    # ---------------------------------------------------------------- at the start

    def _filled(self, shares: Iterable[Share], cap: float) -> Iterator[_Bucket]:
        """Buckets of parameters that can travel together, in the order in which they are full."""
        open_buckets: dict[Any, list[Share]] = {}
        for share in shares:
            parameter = share.parameter
            kind = (share.group, share.divisor, parameter.dtype, parameter.device)
            members = open_buckets.setdefault(kind, [])
            members.append(share)
            itemsize = self.reduction.wire_dtype(parameter.dtype).itemsize
            if sum(s.parameter.numel() for s in members) * itemsize >= cap:
                yield self._bucket(open_buckets.pop(kind))
        for members in open_buckets.values():
            yield self._bucket(members)

    def _bucket(self, shares: list[Share]) -> _Bucket:
        parameters = [share.parameter for share in shares]
        dense = self.reduction.dense_bytes(parameters, parameters[0].dtype.itemsize)
        bucket = _Bucket(shares, dense)
        if dist.get_world_size(shares[0].group) > 1:
            sizes = [parameter.numel() for parameter in parameters]
            dtype = self.reduction.wire_dtype(parameters[0].dtype)
            bucket.buffer = torch.empty(
                sum(sizes) + len(sizes), dtype=dtype, device=parameters[0].device
            )
            parts = bucket.buffer[: sum(sizes)].split(sizes)
            bucket.views = [p.view(own.shape) for p, own in zip(parts, parameters, strict=True)]
        return bucket


def _fill(bucket: _Bucket, buffer: Tensor) -> None:
    """Put the gradients into the buffer: zeros, and a 0 at its end, where there is none."""
    gradients = _gradients(bucket)
    for share, gradient in zip(bucket.shares, gradients, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise TypeError(
                f"the gradient of {share.name!r} has layout {gradient.layout}: build the "
                "embedding with sparse=False; a compact gradient is small already"
            )
    flags = buffer[-len(gradients) :]
    if there := _all_there(gradients):
        flags.fill_(1)
        torch._foreach_copy_(bucket.views, there)
        return
    for gradient, view, flag in zip(gradients, bucket.views, flags, strict=True):
        flag.fill_(gradient is not None)
        view.zero_() if gradient is None else view.copy_(gradient)


def _write_back(bucket: _Bucket) -> None:
    """Make gradients of what was reduced."""
    assert bucket.buffer is not None
    gradients = _gradients(bucket)
    if there := _all_there(gradients):
        torch._foreach_copy_(there, bucket.views)
        return
    used = bucket.buffer[-len(gradients) :].tolist()
    for share, gradient, view, flag in zip(
        bucket.shares, gradients, bucket.views, used, strict=True
    ):
        if gradient is not None:
            gradient.copy_(view)
        elif flag:
            share.parameter.grad = view.to(share.parameter.dtype, copy=True)


def _gradients(bucket: _Bucket) -> list[Tensor | None]:
    return [share.parameter.grad for share in bucket.shares]


def _all_there(gradients: list[Tensor | None]) -> list[Tensor] | None:
    """The gradients, if none is missing."""
    there = [gradient for gradient in gradients if gradient is not None]
    return there if len(there) == len(gradients) else None


def _noting(record: Record) -> Any:
    """What notes that a collective has completed, and hands on its result."""

    def note(future: torch.futures.Future[Any]) -> Any:
        record.completed()
        return future.value()

    return note
