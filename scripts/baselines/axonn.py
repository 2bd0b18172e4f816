"""AxoNN 0.2.0's own reduction of gradients: one all-reduce a parameter, after backward.

Faithful: ``axonn.intra_layer.sync_gradients`` itself, as AxoNN's engine calls it. In its favour:
pipelines send by the transport that the other sides have, and run without MPI.
"""

from typing import Any

import torch
import torch.distributed as dist
from axonn import axonn as ax
from axonn.intra_layer import sync_gradients
from sparse_comm.integrations.axonn import InterLayerEngine
from sparse_comm.integrations.axonn.span import span
from torch import nn


class ReleasedEngine(InterLayerEngine):
    """The engine with AxoNN's reduction, in the gradients' own dtype or rounded to another.

    Args:
        travel: what gradients travel in; None for their own dtype, fp32 under autocast. (AxoNN has
            no other; rounding each before, and back after it, is what its users would add.)
    """

    def __init__(self, *args: Any, travel: torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._travel = travel
        self.bytes_sent = 0  # of the last step

    def _backward_pass(self, output_gradients: Any, microbatch_no: int) -> None:
        with span("backward"):
            super(InterLayerEngine, self)._backward_pass(output_gradients, microbatch_no)

    def _average(self) -> None:
        from axonn import intra_layer

        with span("collective"):
            before, intra_layer.NO_GRADIENT_SYNC = intra_layer.NO_GRADIENT_SYNC, False
            try:
                if self._travel is None:
                    sync_gradients(self.model, mean=True, expert_mode=True)
                else:
                    _average_rounded(self.model, self._travel)
            finally:
                intra_layer.NO_GRADIENT_SYNC = before
        alone = dist.get_world_size(ax.comm_handle.data_parallel_group) == 1
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        each = [g.numel() * (self._travel or g.dtype).itemsize for g in gradients]
        self.bytes_sent = 0 if alone else sum(each)


@torch.no_grad()
def _average_rounded(model: nn.Module, dtype: torch.dtype) -> None:
    group = ax.comm_handle.data_parallel_group
    count = dist.get_world_size(group)
    for parameter in model.parameters():
        if parameter.grad is not None:
            rounded = parameter.grad.div_(count).to(dtype)
            dist.all_reduce(rounded, group=group)
            parameter.grad.copy_(rounded)
