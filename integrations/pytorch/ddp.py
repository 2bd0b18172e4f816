"""DistributedDataParallel over a compact model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_comm import check_masks

__all__ = ["distributed_data_parallel"]


def distributed_data_parallel(
    model: nn.Module, process_group: dist.ProcessGroup | None = None, **options: Any
) -> DistributedDataParallel:
    """``DistributedDataParallel(model, …)`` after a check that all ranks have the same masks.

    Args:
        model: compact model (or any other).
        process_group: the default one if not given.
        **options: of ``DistributedDataParallel``. ``gradient_as_bucket_view`` is True unless said
            otherwise: without it the buckets are a second copy of the gradients, 4f bytes a
            parameter in fp32.

    Returns:
        The wrapped model.

    Raises:
        ValueError: the ranks' masks differ; on every rank, naming parameters and ranks.

    Source: ours.
    """
    check_masks(model, process_group)
    options.setdefault("gradient_as_bucket_view", True)
    return DistributedDataParallel(model, process_group=process_group, **options)
