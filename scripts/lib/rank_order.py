"""Gradient reductions that add in the order of ranks, whatever a gradient's place in its bucket.

gloo adds in an order that depends on the place, so that with three or more ranks a dense and a
compact gradient of equal parts may get sums that differ in the last bit. Slow; for checks only.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


def _mean_in_rank_order(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total.div_(len(parts))


def all_reduce_in_rank_order(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DDP."""
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(_mean_in_rank_order(bucket.buffer(), None))
    return future


class RankOrderReduceScatter(ReduceScatter):
    """For FSDP2: ``module.set_custom_reduce_scatter(RankOrderReduceScatter())``."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Both tensors are 1-D; the input has a part of the output's size for each rank."""
        if op != dist.ReduceOp.AVG:
            raise ValueError(f"reduction must be AVG, got {op}")
        mean = _mean_in_rank_order(input_tensor, group)
        output_tensor.copy_(mean.chunk(group.size())[group.rank()])
