"""Parameters that ZeRO 3 has partitioned: seen whole one at a time, compact one at a time."""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
import torch
from torch import nn

from sparse_comm.compact.convert import Access
from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.slot import Slot

__all__ = ["PartitionedAccess", "drop_caches", "is_partitioned", "whole"]


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO 3 manages this parameter, which then has shape (0,) outside of its use."""
    return hasattr(parameter, "ds_id")


def whole(parameter: nn.Parameter) -> Any:
    """Context in which the parameter has its data. A collective if it is partitioned."""
    if not is_partitioned(parameter):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters([parameter])


def drop_caches(model: nn.Module) -> None:
    """Keep no dense weights of values that are, or are to be, partitioned.

    They would be a whole copy on every rank, and nothing would tell whether it is stale: ZeRO 3
    gathers values into memory of its own.
    """
    for _, _, _, slot in compact_slots(model):
        slot.drop_cache(warn=False)


class PartitionedAccess(Access):
    """For models built under ``deepspeed.zero.Init``. Every use is a collective.

    Each parameter is gathered alone, packed, and its values are partitioned at once, so that no
    rank ever holds more than one whole dense parameter.
    """

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The whole shape."""
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
        return shape

    def values(self, parameter: nn.Parameter, slot: Slot) -> nn.Parameter:
        """Partitioned as the old parameter was."""
        if not is_partitioned(parameter):
            return super().values(parameter, slot)
        with whole(parameter), torch.no_grad():
            new = nn.Parameter(slot.pack(parameter.detach()), parameter.requires_grad)
        if (group := getattr(parameter, _GROUP, None)) is not None:
            setattr(new, _GROUP, group)
        parameter.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
        for name, value in vars(parameter).items():  # what users noted on it, not DeepSpeed
            if not name.startswith("ds_") and name not in new.__dict__:
                setattr(new, name, value)
        return new


# The ranks over which a parameter is to be partitioned, if not over all: DeepSpeed reads it.
_GROUP = "ds_zero_partition_process_group"
