"""FSDP2 (``torch.distributed.fsdp.fully_shard``) over a compact model."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.fsdp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sparse_comm import check_masks
from sparse_comm.compact.module import compact_slots

__all__ = ["fully_shard"]

Module = TypeVar("Module", bound=nn.Module)


def fully_shard(
    module: Module,
    *,
    mesh: DeviceMesh | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    **options: Any,
) -> Module:
    """``torch.distributed.fsdp.fully_shard(module, …)`` for compact modules.

    Besides, it checks that all ranks have the same masks, leaves parameters of which nothing is
    unpruned out of sharding, frozen (FSDP2 crashes on a parameter without entries), and says so
    where cached weights make a whole dense copy live on every rank from forward to backward. Call
    it on each layer, then on the model.

    Args:
        module: compact module (or any other).
        mesh: as in ``fully_shard``; the masks are compared within each of its dimensions.
        ignored_params: as in ``fully_shard``.
        **options: of ``fully_shard``.

    Returns:
        The same module.

    Raises:
        ValueError: the ranks' masks differ; on every rank, naming parameters and ranks.

    Source: ours.
    """
    groups: list[dist.ProcessGroup | None] = [None]
    if mesh is not None:
        groups = list(mesh.get_all_groups())
    for group in groups:
        check_masks(module, group)
    cached = {name: slot for name, _, _, slot in compact_slots(module) if slot.cache is not None}
    if cached:
        name, *others = cached
        warnings.warn(
            f"weights='cached' keeps the dense weights of {name!r} and {len(others)} other "
            "parameters from forward to backward on every rank, unsharded; compact(model, masks, "
            "weights='transient') does not",
            stacklevel=2,
        )
        for slot in cached.values():
            slot.cache = None  # of no use to sharded values
    ignored = set(ignored_params or ())
    for parameter in module.parameters():
        if parameter.numel() == 0:
            ignored.add(parameter)
            # Without a gradient, it does not meet DTensors in clipping and foreach optimizers.
            parameter.requires_grad_(False)
    torch.distributed.fsdp.fully_shard(module, mesh=mesh, ignored_params=ignored or None, **options)
    return module
