"""Buckets for the gradients of a stage, over the ranks that hold the same parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import nn

from sparse_comm.mask_sync import gather
from sparse_comm.reduce import GradientBuckets, Reduction, Share, bucket_cap_mb, measure_link

from .layers import averaging
from .start import state

__all__ = ["agreed_cap_mb", "make_buckets", "trained"]


def make_buckets(
    model: nn.Module,
    there: Mapping[str, str],
    reduction: Reduction,
    cap_mb: float,
    own_batches: bool = False,
) -> GradientBuckets:
    """Without communication.

    Args:
        model: of this rank, compact or dense.
        there: names for messages, by parameter name.
        reduction: in what dtype gradients travel.
        cap_mb: MiB of a bucket, the same on all ranks.
        own_batches: whether each rank has its own part of the batch, whatever the layers.
    """
    reduction.watch(model)
    return GradientBuckets(shares_of(model, there, own_batches), reduction, cap_mb)


def shares_of(model: nn.Module, there: Mapping[str, str], own_batches: bool) -> list[Share]:
    """How each parameter that requires a gradient is averaged."""
    groups, kinds = state().groups, averaging(model, own_batches)
    return [
        Share(there[name], parameter, groups[kinds[name][0]], kinds[name][1])
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def agreed_cap_mb(model: nn.Module, reduction: Reduction) -> float:
    """The size of buckets that suits the slowest link between ranks that average. A collective."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    group = state().groups[frozenset(("data", "depth", "row", "column"))]
    cap_mb = 25.0
    if parameters and dist.get_world_size(group) > 1:
        dtype = reduction.wire_dtype(parameters[0].dtype)
        total = sum(p.numel() * reduction.wire_dtype(p.dtype).itemsize for p in parameters)
        link = measure_link(group, device=state().device, dtype=dtype)
        cap_mb = bucket_cap_mb(link, total)
    # One size for all: ranks that share a group must cut its buckets alike.
    return float(min(gather(cap_mb)))


def trained(model: nn.Module) -> list[int]:
    """Which parameters require a gradient: buckets are made anew if others do."""
    return [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
