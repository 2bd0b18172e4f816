"""Buckets for the gradients of a stage, over the ranks that hold the same parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import nn

from sparse_comm.reduce import GradientBuckets, Reduction, Share, bucket_cap_mb, measure_link

from .layers import averaging
from .start import state

__all__ = ["make_buckets"]


def make_buckets(
    model: nn.Module, there: Mapping[str, str], reduction: Reduction, cap_mb: float | None
) -> GradientBuckets:
    """A collective of the ranks that average, if the size is to be measured.

    Args:
        model: of this rank, compact or dense.
        there: names for messages, by parameter name.
        reduction: in what dtype gradients travel.
        cap_mb: MiB of a bucket; None for the size that suits the link.
    """
    groups, kinds = state().groups, averaging(model)
    shares = [
        Share(there[name], parameter, groups[kinds[name][0]], kinds[name][1])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    reduction.watch(model)
    if cap_mb is None:
        cap_mb = _fitting_cap_mb(shares, reduction, state().device)
    return GradientBuckets(shares, reduction, cap_mb)


def _fitting_cap_mb(shares: Sequence[Share], reduction: Reduction, device: str) -> float:
    group = shares[0].group if shares else None
    if not shares or dist.get_world_size(group) == 1:
        return 1.0
    dtype = reduction.wire_dtype(shares[0].parameter.dtype)
    total = sum(
        s.parameter.numel() * reduction.wire_dtype(s.parameter.dtype).itemsize for s in shares
    )
    return bucket_cap_mb(measure_link(group, device=device, dtype=dtype), total)
