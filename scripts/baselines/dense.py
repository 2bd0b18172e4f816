"""Dense gradient all-reduce in buckets, as DDP does it.

Faithful: the gradients lie in one flat buffer (DDP's ``gradient_as_bucket_view=True``), which is
handed over bucket by bucket without waiting, so that gloo's two threads work on two at a time.
Left out: the division by the number of ranks, in favour of dense, for which it costs most.
"""

import torch.distributed as dist
from torch import Tensor

BUCKET_MB = 25  # DDP's default; from 4 to 50 MB none was faster, on a link or on the loopback


def all_reduce_in_buckets(flat: Tensor, bucket_mb: float = BUCKET_MB) -> None:
    """Sum ``flat`` (1-D, any dtype that gloo reduces) over the ranks, in place."""
    entries = max(1, int(bucket_mb * 2**20) // flat.itemsize)
    works = [dist.all_reduce(bucket, async_op=True) for bucket in flat.split(entries)]
    for work in works:
        work.wait()
