"""The DDP communication hook: compress a bucket, all-reduce it, decompress it.

Like torch's ``bf16_compress_hook``, which refuses gloo, but with one buffer kept a bucket instead
of a new one a step, and with one rounding instead of two.
"""

# No `from __future__ import annotations` in this file: DDP compares the hook's annotations with
# the classes and refuses their names.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_comm.reduce.reduction import InnerHook, Reduction
from sparse_comm.reduce.span import span
from sparse_comm.reduce.stats import Record

__all__ = ["reduce_hook"]


def reduce_hook(reduction: Reduction, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks, with one collective in the reduction's dtype.

    Gradients are divided by the number of ranks in their own dtype, rounded once (to nearest
    even), summed by the backend in ``reduction.dtype``, and written back into the bucket. What
    all ranks end with is the same, bit for bit. With ``dtype=None`` it is what plain DDP makes of
    gradients that start from None, bit for bit. On one rank, and for a bucket without entries,
    nothing is sent and nothing rounded. Inside ``ddp.join()`` the divisor stays the number of all
    ranks, as in torch's own hooks.

    Example::

        ddp.register_comm_hook(Reduction(dtype=torch.bfloat16), reduce_hook)

    Args:
        reduction: how to reduce.
        bucket: given by DDP.

    Returns:
        A future of the bucket's own buffer. On gloo, its threads decompress while backward goes
        on: profilers show that with ``profile_all_threads``.

    Raises:
        TypeError: ``reduction`` is not a Reduction, or ``bucket`` not a bucket.
        RuntimeError: the bucket is being reduced already.

    Source: ours, after torch.distributed.algorithms.ddp_comm_hooks.
    """
    _check(reduction, bucket)
    gradients = bucket.buffer()
    kept = reduction._begin(gradients)
    send = gradients if kept.send is None else kept.send
    alone = reduction.hook is None and reduction._is_alone(gradients)
    record = reduction._record(bucket, kept, None if alone else send)

    def finish(future: torch.futures.Future[Any]) -> Tensor:
        try:
            if record is not None:
                record.completed()
            return _decompress(future.value(), gradients, send)
        finally:
            if bucket.buffer() is not gradients:
                bucket.set_buffer(gradients)
            kept.under_way = False

    future: torch.futures.Future[Any]
    try:
        if reduction.hook is not None:
            future = _hand_on(reduction.hook, bucket, gradients, send, record)
        elif alone:
            future = _completed(gradients)
        else:
            future = _all_reduce(reduction, gradients, send, record)
        return future.then(finish)
    except BaseException:
        kept.under_way = False
        raise


def _check(reduction: Reduction, bucket: dist.GradBucket) -> None:
    if not isinstance(reduction, Reduction):
        raise TypeError(
            f"reduce_hook needs a Reduction as its state, got {type(reduction).__name__}: "
            "ddp.register_comm_hook(Reduction(process_group=…), reduce_hook)"
        )
    if not isinstance(bucket, dist.GradBucket):
        raise TypeError(
            f"reduce_hook reduces DDP's buckets, got a {type(bucket).__name__}: "
            "torch._dynamo.config.optimize_ddp = 'python_reducer' has none; choose another value"
        )


def _all_reduce(
    reduction: Reduction, gradients: Tensor, send: Tensor, record: Record | None
) -> torch.futures.Future[list[Tensor]]:
    """The sum over ranks of the divided gradients, in ``send``."""
    with span("compress"):
        # Multiplied by the reciprocal, as DDP does without a hook: for three ranks that is not
        # what torch's hooks get by dividing, in the last bit.
        gradients.mul_(1 / reduction.world_size)
        if send is not gradients:
            send.copy_(gradients)
    if record is not None:
        record.sent()
    with span("all_reduce"):
        work = dist.all_reduce(send, group=reduction.process_group, async_op=True)
        return work.get_future()


def _hand_on(
    hook: InnerHook,
    bucket: dist.GradBucket,
    gradients: Tensor,
    send: Tensor,
    record: Record | None,
) -> torch.futures.Future[Tensor]:
    """What the user's hook makes of the bucket in the dtype of ``send``."""
    if send is not gradients:
        with span("compress"):
            send.copy_(gradients)
        bucket.set_buffer(send)
    if record is not None:
        record.sent()
    state, function = hook
    with span("hook"):
        return function(state, bucket)


def _decompress(result: Tensor | list[Tensor], gradients: Tensor, send: Tensor) -> Tensor:
    reduced = result if isinstance(result, Tensor) else result[0]
    if send is gradients:
        return reduced
    with span("decompress"):
        return gradients.copy_(reduced)


def _completed(gradients: Tensor) -> torch.futures.Future[Tensor]:
    device = gradients.device
    future: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=None if device.type == "cpu" else [device]
    )
    future.set_result(gradients)
    return future
