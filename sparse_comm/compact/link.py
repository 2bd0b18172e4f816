"""From a dense tensor back to the values behind it: every write to one reaches the other."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from sparse_comm.compact.slot import Slot
from sparse_comm.compact.watch import REPLACED

__all__ = ["Link", "assign_dense", "memory_format_of", "warn_dropped", "write_dense"]


class Link:
    """The tensor of values behind a dense tensor: the parameter's values, or their gradient."""

    __slots__ = ("base", "slot", "values", "version")

    def __init__(self, slot: Slot, values: Tensor, base: Tensor) -> None:
        self.slot, self.values, self.base = slot, values, base
        self.version = _version(values)  # that the dense tensor was made from

    def follow(self) -> None:
        """Bring the dense tensor up to date, if it was kept while the values changed."""
        if _version(self.values) != self.version and self.values.untyped_storage().nbytes():
            if torch._C._current_graph_task_id() != -1:  # a custom autograd.Function saved it
                raise RuntimeError(
                    f"the values of compact parameter {self.slot.name!r} changed between forward "
                    "and a backward that reads its dense weight: run backward first"
                )
            self.restore()

    def write_back(self) -> None:
        """Pack what was written to the dense tensor, and zero its pruned entries again."""
        if hasattr(self.values, REPLACED):
            self.slot.mark_stale()  # the write may have gone to the cache
            raise RuntimeError(
                f"write to a dense weight of {self.slot.name!r} that was kept while its values "
                "were replaced (densify, update_masks or load_state_dict(assign=True)): take the "
                "module's attribute anew"
            )
        write_dense(self.slot, self.values, self.base.detach())
        self.restore()

    def restore(self) -> None:
        """Make the dense tensor equal to the values."""
        with torch.no_grad():
            self.base.detach().copy_(self.slot.expand(self.values.detach(), self.base.dtype))
        self.version = _version(self.values)
        self.slot.mark_stale()


def write_dense(slot: Slot, values: Tensor, dense: Tensor) -> None:
    """Pack ``dense`` into ``values``, in place and without gradient.

    Where the dtypes differ, only entries that were written change, so that a write to one entry of
    a bf16 weight leaves the fp32 values of the others as precise as they were.
    """
    with torch.no_grad():
        dense = dense.detach().to(values.device)
        packed = slot.pack(dense)
        if int(dense.count_nonzero()) > int(packed.count_nonzero()):
            warn_dropped(slot.name)
        if packed.dtype != values.dtype:
            changed = packed != values.to(packed.dtype)
            packed = torch.where(changed, packed.to(values.dtype), values.detach())
        values.detach().copy_(packed)
        slot.mark_stale()


def assign_dense(slot: Slot, values: Tensor, dense: Tensor) -> None:
    """Take over ``dense`` as a parameter would: with its dtype, device and layout."""
    dtype = values.dtype if slot.compute_dtype else dense.dtype
    if (values.device, values.dtype) != (dense.device, dtype):
        values.data = values.data.to(dense.device, dtype)
    slot.memory_format = memory_format_of(dense)
    slot.place(values)
    write_dense(slot, values, dense)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last where the tensor is laid out so and not contiguous, else contiguous."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout):
            return torch.contiguous_format if tensor.is_contiguous() else layout
    return torch.contiguous_format


def warn_dropped(name: str) -> None:
    """Once a process: initialisation writes everywhere, and a line a layer would be noise."""
    global _warned_dropped
    if not _warned_dropped:
        _warned_dropped = True
        warnings.warn(
            f"a dense tensor written to compact parameter {name!r} has non-zero entries where it "
            "is pruned; they stay zero (said once, other parameters are treated alike)",
            stacklevel=4,
        )


_warned_dropped = False


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
