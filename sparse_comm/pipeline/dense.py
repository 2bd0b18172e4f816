"""The codec that changes nothing: for integers, and for whatever has no zeros to leave out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .codec import Kept, MessageError

__all__ = ["Dense"]


class Dense:
    """All entries, row-major, as they are."""

    name = "dense"

    def bound(self, tensor: Tensor) -> int:
        """See Codec."""
        return tensor.nbytes

    def write(self, room: Tensor, tensor: Tensor, kept: Kept | None) -> tuple[int, Kept | None]:
        """See Codec."""
        nbytes = tensor.nbytes
        if nbytes:
            room[:nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())
        return nbytes, None

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, Kept | None]:
        """See Codec. The tensor is a view of the data."""
        if data.numel() != math.prod(shape) * dtype.itemsize:
            raise MessageError(f"{data.numel()} bytes for a tensor of {dtype} and shape {shape}")
        if data.numel() == 0:
            return torch.empty(shape, dtype=dtype), None
        return data.view(dtype).view(shape), None
