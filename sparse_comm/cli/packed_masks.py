"""Masks in an eighth of their memory, for ``save_masks`` to take one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from sparse_comm.kernels import unpack_bits
from sparse_comm.pattern import SparsityPattern

__all__ = ["PackedMasks"]


class PackedMasks(Mapping[str, Tensor]):
    """Masks by name, kept as bits; looking one up unpacks it anew.

    The bits lie in one block, made beforehand: small ones that outlive large temporary masks would
    leave holes between them, and memory would grow to several times what is in use.

    Args:
        shapes: a tensor of the shape of each mask that may be added, by name.

    Attributes:
        shapes: the shape of each mask that was added.
        nnz: its number of unpruned entries.
    """

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        sizes = (-(-shape.numel() // 64) * 8 for shape in shapes.values())
        ends = dict(zip(shapes, accumulate(sizes), strict=True))
        self._bits = torch.zeros(max(ends.values(), default=0), dtype=torch.uint8)
        self._ends = ends
        self.shapes: dict[str, torch.Size] = {}
        self.nnz: dict[str, int] = {}

    def add(self, name: str, mask: Tensor) -> None:
        """Keep a mask."""
        pattern = SparsityPattern(mask)
        end = self._ends[name]
        self._bits[end - pattern.bitmap.numel() : end] = pattern.bitmap
        self.shapes[name], self.nnz[name] = pattern.shape, pattern.nnz

    def __getitem__(self, name: str) -> Tensor:
        shape, end = self.shapes[name], self._ends[name]
        start = end - -(-shape.numel() // 64) * 8
        return unpack_bits(self._bits[start:end], 0, shape.numel()).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
