"""DistributedDataParallel over a compact model."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_comm import check_masks
from sparse_comm.reduce import Reduction, bucket_cap_mb, measure_link, reduce_hook

__all__ = ["distributed_data_parallel"]

# torch.compile refuses DDP models with smaller buckets than its first, and steps over a loopback
# and over 1 Gbit/s were no faster with 0.25 and 0.5 (29M-parameter GPT, density 0.1).
_LEAST_MIB = 1.0


def distributed_data_parallel(
    model: nn.Module,
    process_group: dist.ProcessGroup | None = None,
    reduction: Reduction | None = None,
    **options: Any,
) -> DistributedDataParallel:
    """``DistributedDataParallel(model, …)`` after a check that all ranks have the same masks.

    Args:
        model: compact model (or any other).
        process_group: the default one if not given.
        reduction: how to reduce gradients; as plain DDP does if not given. It is registered as
            DDP's communication hook, of which DDP takes one only: hand yours to
            ``Reduction(hook=…)``. With it, and without a hook of yours in it, ``bucket_cap_mb``
            is chosen if not given: the link is measured for some tenths of a second. It is at
            least 1, as ``torch.compile`` needs.
        **options: of ``DistributedDataParallel``. ``gradient_as_bucket_view`` is True unless said
            otherwise: without it the buckets are a second copy of the gradients, 4f bytes a
            parameter in fp32.

    Returns:
        The wrapped model.

    Raises:
        ValueError: the ranks' masks differ; on every rank, naming parameters and ranks. Or the
            reduction is for another process group, or ``mixed_precision`` has DDP's one hook.

    Source: ours.
    """
    group = _group(process_group, options)
    check_masks(model, group)
    options.setdefault("gradient_as_bucket_view", True)
    if reduction is None:
        return DistributedDataParallel(model, process_group=process_group, **options)
    _check(reduction, group, options)
    sized = options.get("bucket_cap_mb") or options.get("bucket_cap_mb_list")
    if not sized and reduction.hook is None:
        options["bucket_cap_mb"] = _chosen_bucket_cap_mb(model, reduction)
    ddp = DistributedDataParallel(model, process_group=process_group, **options)
    reduction.watch(model)
    ddp.register_comm_hook(reduction, reduce_hook)
    return ddp


def _group(group: dist.ProcessGroup | None, options: dict[str, Any]) -> dist.ProcessGroup | None:
    """The process group that DDP will use."""
    mesh = options.get("device_mesh")
    return mesh.get_group(mesh_dim=0) if group is None and mesh is not None else group


def _check(reduction: Reduction, group: dist.ProcessGroup | None, options: dict[str, Any]) -> None:
    if (reduction.process_group or dist.group.WORLD) is not (group or dist.group.WORLD):
        raise ValueError(
            "the reduction and DDP have different process groups: give both the same, "
            "Reduction(process_group=group) and distributed_data_parallel(…, process_group=group)"
        )
    if options.get("mixed_precision") is not None:
        raise ValueError(
            "DDP's mixed_precision registers a communication hook of its own, and DDP takes one "
            "only: use autocast, or compact(model, masks, compute_dtype=…), with a reduction"
        )


def _chosen_bucket_cap_mb(model: nn.Module, reduction: Reduction) -> float | None:
    """The size that suits the link, in MiB of gradients in their own dtype, as DDP counts."""
    gradients = _reduced_parameters(model)
    own = sum(p.nbytes for p in gradients)
    if not own or reduction.world_size == 1:
        return None
    wire = sum(p.numel() * reduction.wire_dtype(p.dtype).itemsize for p in gradients)
    largest = max(gradients, key=lambda p: p.nbytes)
    link = measure_link(
        reduction.process_group,
        device=largest.device,
        dtype=reduction.wire_dtype(largest.dtype),
    )
    return max(_LEAST_MIB, bucket_cap_mb(link, wire) * own / wire)


def _reduced_parameters(model: nn.Module) -> list[Tensor]:
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    return [p for name, p in model.named_parameters() if p.requires_grad and name not in ignored]
