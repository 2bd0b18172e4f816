"""Which entries of a parameter are unpruned: a bitmap with block offsets.

One bit an entry plus one 64-bit offset per 4096-entry block is 0.127 bytes an entry: less than
the int32 index of SAMO (4f bytes) for every density f > 1/32, and quick to decode in blocks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from sparse_comm.kernels import BLOCK, block_offsets, nonzeros_into, unpack_bits

__all__ = ["SparsityPattern"]

_WORD = 64
_CHUNK = 1 << 24  # entries handled at a time where a whole-parameter temporary would be large


class SparsityPattern:
    """The unpruned entries of a parameter, in row-major order. Immutable.

    Args:
        mask: bool tensor of the parameter's shape, True where the entry is unpruned. Any shape,
            0-d and empty included; any device; more than 2**31 entries are fine.

    Attributes:
        bitmap: uint8, 1-D, one bit an entry, least significant bit first, padded with zeros to
            whole 64-bit words.
        offsets: int64, one more than there are 4096-entry blocks: the number of unpruned entries
            before each block; the last one is ``nnz``.
        shape: shape of the parameter.
        nnz: number of unpruned entries.

    Raises:
        TypeError: ``mask`` is not a bool tensor.

    Source: ours (SAMO keeps an int32 index a layer: Singh & Bhatele, IPDPS 2023, section III).
    """

    bitmap: Tensor
    offsets: Tensor
    shape: torch.Size
    nnz: int
    numel: int

    def __init__(self, mask: Tensor) -> None:
        if not isinstance(mask, Tensor):
            raise TypeError(
                f"a mask must be a torch.Tensor of dtype torch.bool, got {type(mask).__name__}; "
                "use SparsityPattern.from_scipy or from_indices for other kinds"
            )
        if mask.dtype != torch.bool:
            raise TypeError(
                f"a mask must have dtype torch.bool, got {mask.dtype}; convert it with mask != 0"
            )
        if mask.is_meta:
            raise TypeError("a mask must hold data, got a tensor on the meta device")
        flat = mask.detach().reshape(-1).cpu().numpy()
        bits = _empty_bitmap(flat.size)
        bits[: -(-flat.size // 8)] = np.packbits(flat, bitorder="little")
        self._set(bits, tuple(mask.shape))
        if mask.device.type != "cpu":
            self.bitmap = self.bitmap.to(mask.device)
            self.offsets = self.offsets.to(mask.device)

    def _set(self, bits: np.ndarray, shape: tuple[int, ...]) -> None:
        self.shape = torch.Size([int(n) for n in shape])  # numpy's integers would alter the digest
        self.numel = math.prod(self.shape)
        self.bitmap = torch.from_numpy(bits)
        offsets = block_offsets(bits)
        self.offsets = torch.from_numpy(offsets)
        self.nnz = int(offsets[-1])

    @classmethod
    def _from_bitmap(cls, bits: np.ndarray, shape: Sequence[int]) -> SparsityPattern:
        """A pattern around packed bits that are known to fit ``shape``, padding zeroed."""
        pattern = cls.__new__(cls)
        pattern._set(bits, tuple(shape))
        return pattern

    @classmethod
    def from_nonzeros(cls, tensor: Tensor, bitmap: Tensor | None = None) -> SparsityPattern:
        """The pattern of the entries that are not zero. Bits count: -0.0 is not zero.

        Args:
            tensor: of any shape and real dtype, with data.
            bitmap: where to write the bitmap, which the pattern then keeps: uint8, contiguous, of
                ``ceil(numel / 64) * 8`` bytes, on the tensor's device; a new one if not given.

        Raises:
            ValueError: ``bitmap`` is of another size, dtype or device; the tensor is complex.

        Source: ours.
        """
        numel = tensor.numel()
        if bitmap is None:
            bitmap = tensor.new_empty(-(-numel // _WORD) * (_WORD // 8), dtype=torch.uint8)
        pattern = cls.__new__(cls)
        pattern.shape, pattern.numel, pattern.bitmap = tensor.shape, numel, bitmap
        pattern.offsets = tensor.new_empty(-(-numel // BLOCK) + 1, dtype=torch.int64)
        pattern.nnz = nonzeros_into(bitmap, pattern.offsets, tensor.detach())
        return pattern

    @classmethod
    def from_bitmap(cls, bitmap: Tensor, shape: Sequence[int]) -> SparsityPattern:
        """The pattern of a bitmap, which it keeps.

        Args:
            bitmap: as the attribute of that name: uint8, contiguous, on the CPU.
            shape: of the parameter.

        Raises:
            ValueError: it is of another size or dtype, or has bits set after the last entry.
        """
        numel = math.prod(shape)
        words = -(-numel // _WORD)
        if bitmap.dtype != torch.uint8 or bitmap.shape != (words * (_WORD // 8),):
            raise ValueError(
                f"the bitmap of {numel} entries is uint8 of shape ({words * (_WORD // 8)},), got "
                f"{bitmap.dtype} of shape {tuple(bitmap.shape)}"
            )
        bits = bitmap.numpy()
        if numel % _WORD and int(bits[-8:].view("<u8")[0]) >> numel % _WORD:
            raise ValueError(f"bits are set after entry {numel}, the last one of the bitmap")
        return cls._from_bitmap(bits, shape)

    @classmethod
    def from_indices(
        cls, indices: Tensor | np.ndarray | Sequence[int], shape: Sequence[int]
    ) -> SparsityPattern:
        """The pattern whose unpruned entries stand at ``indices``.

        Args:
            indices: integers, 1-D, positions in the row-major flattened parameter, in any order.
            shape: shape of the parameter.

        Raises:
            ValueError: an index is out of range or stands twice, or a size is negative.
            TypeError: the indices are not integers.
        """
        given = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else indices
        index = np.asarray(given).reshape(-1)
        if index.size and not np.issubdtype(index.dtype, np.integer):
            raise TypeError(f"indices must be integers, got {index.dtype}")
        index = np.sort(index.astype(np.int64))
        if min(shape, default=0) < 0:
            raise ValueError(f"a shape has no negative sizes, got {tuple(shape)}")
        numel = math.prod(map(int, shape))
        if index.size and (index[0] < 0 or index[-1] >= numel):
            bad = index[0] if index[0] < 0 else index[-1]
            raise ValueError(f"index {bad} is outside a parameter of {numel} entries")
        if (twice := np.flatnonzero(index[1:] == index[:-1])).size:
            raise ValueError(f"index {index[twice[0]]} stands more than once")
        bits = _empty_bitmap(numel)
        if index.size:
            byte = index >> 3
            first = np.concatenate([[0], np.flatnonzero(np.diff(byte)) + 1])
            bit = np.left_shift(np.uint8(1), (index & 7).astype(np.uint8))
            bits[byte[first]] = np.bitwise_or.reduceat(bit, first)
        return cls._from_bitmap(bits, shape)

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparsityPattern:
        """The pattern of the entries that a ``scipy.sparse`` array or matrix stores.

        Stored zeros count as unpruned; call ``matrix.eliminate_zeros()`` first if they should not.
        """
        if not scipy.sparse.issparse(matrix):
            raise TypeError(f"expected a scipy.sparse matrix, got {type(matrix).__name__}")
        coo = matrix.tocoo(copy=True)
        coo.sum_duplicates()
        coords = coo.coords if hasattr(coo, "coords") else (coo.row, coo.col)
        coords = tuple(np.asarray(c, np.int64) for c in coords)
        return cls.from_indices(np.ravel_multi_index(coords, coo.shape), coo.shape)

    def to_mask(self) -> Tensor:
        """The bool mask, of the parameter's shape, on the pattern's device."""
        return unpack_bits(self.bitmap, 0, self.numel).reshape(self.shape)

    def to_indices(self) -> Tensor:
        """Positions of the unpruned entries in the flattened parameter: int64, ascending."""
        parts = [
            unpack_bits(self.bitmap, a, min(a + _CHUNK, self.numel)).nonzero().flatten() + a
            for a in range(0, self.numel, _CHUNK)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.device)

    def to_scipy(self, values: Tensor | None = None) -> Any:
        """A ``scipy.sparse`` array: CSR of a matrix, COO of any other number of dimensions.

        Args:
            values: 1-D, ``nnz`` values in the pattern's order; True everywhere if not given.

        Raises:
            ValueError: wrong number of values, or a 0-d pattern (scipy has none).
        """
        if len(self.shape) == 0:
            raise ValueError("scipy.sparse has no 0-d arrays")
        if values is not None and tuple(values.shape) != (self.nnz,):
            raise ValueError(f"expected values of shape ({self.nnz},), got {tuple(values.shape)}")
        coords = np.unravel_index(self.to_indices().cpu().numpy(), tuple(self.shape))
        data = np.ones(self.nnz, bool) if values is None else values.detach().cpu().numpy()
        coo = scipy.sparse.coo_array((data, coords), shape=tuple(self.shape))
        return coo.tocsr() if len(self.shape) == 2 else coo

    @property
    def density(self) -> float:
        """nnz / numel; 1.0 for an empty parameter, of which nothing is pruned."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def nbytes(self) -> int:
        """Bytes that the bitmap and the offsets take."""
        return self.bitmap.nbytes + self.offsets.nbytes

    @property
    def device(self) -> torch.device:
        """Where the bitmap is."""
        return self.bitmap.device

    def to(self, device: torch.device | str) -> SparsityPattern:
        """This pattern on ``device``; itself if it is there already, or if that is ``meta``."""
        device = torch.device(device)
        if device.type == "meta" or self.bitmap.device == device:
            return self
        moved = self.__class__.__new__(self.__class__)
        moved.__dict__.update(self.__dict__)
        moved.bitmap, moved.offsets = self.bitmap.to(device), self.offsets.to(device)
        return moved

    @cached_property
    def _digest(self) -> str:
        hashed = hashlib.blake2b(digest_size=16)
        hashed.update(f"sparse_comm pattern 1 {tuple(self.shape)}\n".encode())
        hashed.update(self.bitmap.cpu().numpy().data)
        return hashed.hexdigest()

    def digest(self) -> str:
        """128 bits of BLAKE2b over shape and bitmap, in hexadecimal.

        Equal for equal patterns, on every machine, device and version: it may be stored.
        """
        return self._digest

    def is_n_m(self, n: int, m: int, dim: int = -1) -> bool:
        """Whether each ``m`` consecutive entries along ``dim`` hold at most ``n`` unpruned ones.

        Raises:
            ValueError: the size along ``dim`` is not a multiple of ``m``.
        """
        if not 0 < n <= m:
            raise ValueError(f"N:M needs 0 < n <= m, got {n}:{m}")
        size = self.shape[dim]
        if size % m:
            raise ValueError(f"{n}:{m} needs a multiple of {m} entries along dim {dim}, got {size}")
        groups = self.to_mask().movedim(dim, -1).reshape(-1, m)
        return bool((groups.sum(-1) <= n).all())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.bitmap, other.bitmap.to(self.device))

    def __hash__(self) -> int:
        return hash(self.digest())

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityPattern:
        return self  # immutable

    def __repr__(self) -> str:
        return (
            f"SparsityPattern(shape={tuple(self.shape)}, nnz={self.nnz}, "
            f"density={self.density:.4g}, device={str(self.device)!r})"
        )


def _empty_bitmap(numel: int) -> np.ndarray:
    return np.zeros(-(-numel // _WORD) * (_WORD // 8), np.uint8)
