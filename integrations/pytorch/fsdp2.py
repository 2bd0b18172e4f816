"""FSDP2 (``torch.distributed.fsdp.fully_shard``) over a compact model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from sparse_comm import check_masks
from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.slot import is_sharded
from sparse_comm.reduce import Reduction
from sparse_comm.reduce.stats import Recorder

__all__ = ["fully_shard"]

Module = TypeVar("Module", bound=nn.Module)


def fully_shard(
    module: Module,
    *,
    mesh: DeviceMesh | None = None,
    ignored_params: set[nn.Parameter] | None = None,
    reduction: Reduction | None = None,
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
        reduction: the dtype in which gradients are reduced and, with ``stats=True``, where the
            figures of the reduce-scatters go (not those of a 2-D mesh's all-reduces, and none in
            a group of one, which has nothing to scatter). Give all modules the same. FSDP2 itself
            rounds, sums and averages in that dtype, and accumulates in it without sync.
        **options: of ``fully_shard``.

    Returns:
        The same module.

    Raises:
        ValueError: the ranks' masks differ; on every rank, naming parameters and ranks. Or the
            reduction has a hook or a process group, or another dtype than ``mp_policy``.

    Source: ours.
    """
    trained = [
        p
        for p in module.parameters()
        if p.requires_grad and p.numel() and not is_sharded(p) and p not in (ignored_params or ())
    ]
    comm = None
    if reduction is not None and trained:
        policy = options.get("mp_policy") or MixedPrecisionPolicy()
        dtype = policy.param_dtype or trained[0].dtype
        options["mp_policy"] = _with_dtype(policy, reduction, dtype)
        comm = _comm(module, reduction, trained, dtype)
    for group in [None] if mesh is None else mesh.get_all_groups():
        check_masks(module, group)
    _give_up_caches(module)
    ignored = _without_empty(module, ignored_params)
    torch.distributed.fsdp.fully_shard(module, mesh=mesh, ignored_params=ignored or None, **options)
    if comm is not None:
        module.set_custom_reduce_scatter(comm)  # type: ignore[operator]  # it is an FSDPModule now
    return module


def _give_up_caches(module: nn.Module) -> None:
    """Of no use to sharded values."""
    cached = {name: slot for name, _, _, slot in compact_slots(module) if slot.cache is not None}
    if not cached:
        return
    name, *others = cached
    warnings.warn(
        f"weights='cached' keeps the dense weights of {name!r} and {len(others)} other "
        "parameters from forward to backward on every rank, unsharded; compact(model, masks, "
        "weights='transient') does not",
        stacklevel=3,
    )
    for slot in cached.values():
        slot.drop_cache(warn=False)


def _without_empty(module: nn.Module, ignored: set[nn.Parameter] | None) -> set[nn.Parameter]:
    """The ignored parameters and those without entries, which are frozen."""
    empty = {parameter for parameter in module.parameters() if parameter.numel() == 0}
    for parameter in empty:
        # Without a gradient, it does not meet DTensors in clipping and foreach optimizers.
        parameter.requires_grad_(False)
    return empty | (ignored or set())


def _with_dtype(
    policy: MixedPrecisionPolicy, reduction: Reduction, dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """The policy, reducing gradients of ``dtype`` as the reduction says."""
    if reduction.hook is not None or reduction.process_group is not None:
        raise ValueError(
            "FSDP2 reduces by reduce-scatter in the groups of its mesh: give it a Reduction "
            "without hook and process_group"
        )
    wire = reduction.wire_dtype(dtype)
    if reduction.dtype is not None and policy.reduce_dtype not in (None, wire):
        raise ValueError(
            f"mp_policy reduces in {policy.reduce_dtype}, the reduction in {wire}: leave "
            "reduce_dtype out, or say Reduction(dtype=None)"
        )
    return policy if wire == dtype else dataclasses.replace(policy, reduce_dtype=wire)


def _comm(
    module: nn.Module, reduction: Reduction, trained: list[nn.Parameter], dtype: torch.dtype
) -> _Recorded | None:
    """What keeps the figures of this module's reduce-scatters, if they are wanted."""
    if reduction.recorder is None:
        return None
    reduction.watch(module)
    return _Recorded(reduction.recorder, reduction.dense_bytes(trained, dtype.itemsize))


class _Recorded:
    """FSDP2's default reduce-scatter, in the form ``set_custom_reduce_scatter`` takes."""

    def __init__(self, recorder: Recorder, bytes_dense: int | None) -> None:
        self._recorder = recorder
        self._bytes_dense = bytes_dense

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A new tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce-scatter, and note it."""
        record = self._recorder.handed_over(
            self,
            dtype=input_tensor.dtype,
            on_cpu=input_tensor.device.type == "cpu",
            bytes_dense=self._bytes_dense,
            bytes_sent=input_tensor.nbytes,
            collectives=1,
            blocks=True,
        )
        record.sent()
        work = dist.reduce_scatter_tensor(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
        record.completed()
        return work
