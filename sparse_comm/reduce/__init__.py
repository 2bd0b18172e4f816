"""Gradient reduction beyond the framework's own: fewer bits on the wire, and figures.

    from sparse_comm.reduce import Reduction, reduce_hook

    reduction = Reduction(dtype=torch.bfloat16, stats=True)
    ddp.register_comm_hook(reduction, reduce_hook)
    ...
    reduction.stats()  # bytes, collectives and times a step

A compact model's gradients are compact without any of this; here they also travel in a smaller
dtype, on gloo, too, and say what they cost.
"""

from sparse_comm.reduce.buckets import GradientBuckets, Share
from sparse_comm.reduce.hook import reduce_hook
from sparse_comm.reduce.link import Link, bucket_cap_mb, measure_link
from sparse_comm.reduce.reduction import Reduction

__all__ = [
    "GradientBuckets",
    "Link",
    "Reduction",
    "Share",
    "bucket_cap_mb",
    "measure_link",
    "reduce_hook",
]
