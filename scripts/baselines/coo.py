"""torch's own sparse all-reduce: ``torch.distributed.all_reduce`` of COO tensors, layer by layer.

Faithful: the collective is gloo's, which gathers every rank's indices and values and adds the
ranks' tensors by torch's sparse addition. It cannot know that the ranks' indices are the same.
In its favour: the positions of the unpruned entries are found once, not in each step, and are
those of the flattened gradient, so that an entry takes one int64 and not one a dimension.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_coo(gradients: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
    """Sum the unpruned entries of dense gradients over the ranks.

    Args:
        gradients: one dense fp32 tensor a layer.
        indices: for each, int64, ascending: where its unpruned entries stand when flattened.

    Returns:
        For each, a coalesced sparse COO tensor of the flattened gradient's shape.
    """
    layers = [
        torch.sparse_coo_tensor(
            index.unsqueeze(0),
            gradient.flatten().index_select(0, index),
            (gradient.numel(),),
            is_coalesced=True,
            check_invariants=False,
        )
        for gradient, index in zip(gradients, indices, strict=True)
    ]
    works = [dist.all_reduce(layer, async_op=True) for layer in layers]
    for work in works:
        work.wait()
    return layers
