"""What a codec is: how one tensor of a message becomes bytes, and the bytes the tensor again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_comm.pattern import SparsityPattern

__all__ = ["Codec", "Kept", "MessageError"]


class MessageError(RuntimeError):
    """A message between stages was truncated or damaged, or is another than was expected."""


@dataclass(frozen=True)
class Kept:
    """What both stages know of a tensor, so that its gradient need not say it again.

    Attributes:
        pattern: the entries of which the gradient counts: the others are multiplied by zero.
        guards: whether they are so by a product, to which a gradient of inf or NaN does count.
    """

    pattern: SparsityPattern
    guards: bool = False


class Codec(Protocol):
    """One way to send a tensor. It keeps no state: stages may share one.

    Attributes:
        name: by which users choose it.
    """

    name: str

    def bound(self, tensor: Tensor) -> int:
        """Bytes of room that ``write`` may need."""

    def write(
        self, room: Tensor, tensor: Tensor, kept: Kept | None
    ) -> tuple[int, Kept | None] | None:
        """Write a tensor, or decline.

        Args:
            room: to write to: uint8, 1-D, aligned to 64 bytes.
            tensor: of any shape, dtype and layout, maybe with its autograd graph.
            kept: of a gradient: what was kept of the tensor whose gradient it is.

        Returns:
            How many bytes were written, and what to keep for the gradient that comes back; None if
            the tensor would not become smaller, and is to go dense.
        """

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, Kept | None]:
        """The tensor that was written, and what to keep for its gradient.

        Raises:
            MessageError: the data cannot be those of such a tensor.
        """
