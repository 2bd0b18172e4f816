"""AxoNN's dynamic loss scale for fp16, on which ranks agree without MPI."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["agree_on_scale", "unscale"]


def unscale(model: nn.Module, scale: float, device: str) -> bool:
    """Divide gradients by the loss scale; whether any of this rank has overflowed."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found = torch.zeros(1, device=device)
    inverse = torch.full((1,), 1 / scale, device=device)
    if gradients:
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, inverse)
    return bool(found.item())


def agree_on_scale(scaler: Any, local_overflow: bool, device: str) -> bool:
    """Halve the scale if any rank has overflowed, double it after long peace; whether one has.

    The arithmetic of AxoNN's ``_sync_scale``, which needs MPI. A collective of all ranks.

    Args:
        scaler: AxoNN's, with ``loss_scale``, ``min_scale``, ``max_scale``, ``scaling_window`` and
            ``no_overflow_iters``.
        local_overflow: whether this rank has.
        device: of the process group's tensors.
    """
    overflow = torch.tensor([float(local_overflow)], device=device)
    dist.all_reduce(overflow, dist.ReduceOp.MAX)
    said = ""
    if overflow.item():
        scaler.loss_scale = max(scaler.loss_scale / 2, scaler.min_scale)
        scaler.no_overflow_iters = 0
        said = f"overflow detected - reducing loss scale to {scaler.loss_scale}"
    else:
        scaler.no_overflow_iters += 1
        if scaler.no_overflow_iters == scaler.scaling_window:
            scaler.loss_scale = min(scaler.loss_scale * 2, scaler.max_scale)
            scaler.no_overflow_iters = 0
            said = f"increasing loss scale to {scaler.loss_scale}"
    if said and dist.get_rank() == 0:
        print(said)
    return bool(overflow.item())
