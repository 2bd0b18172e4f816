"""The codec of tensors that are zero in many places: a bitmap, and the other entries.

A stage that ends in a ReLU sends zeros where it is off. No gradient passes there, so the gradient
of such a tensor has entries that nobody reads: both stages keep the bitmap, and the way back needs
none (``support.py`` says for which tensors that holds). Any other gradient has a bitmap of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_comm.kernels import expand, pack
from sparse_comm.pattern import SparsityPattern

from .codec import Kept, MessageError
from .support import support_of

__all__ = ["Zeros"]

_HEAD = 16  # bytes: number of values, and which of the following
_KEEPS, _GUARDS, _REPLIES = 1, 2, 4
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Zeros:
    """A bit an entry, and the entries that are not zero, bit for bit: -0.0 and NaN are not.

    A gradient leaves out what was zero on the way there, if no gradient passes where it was.

    Source: ours; OmniReduce (Fei et al., SIGCOMM 2021) leaves out blocks of zeros.
    """

    name = "zeros"

    def bound(self, tensor: Tensor) -> int:
        """See Codec."""
        return _HEAD + _bitmap_bytes(tensor.numel()) + tensor.nbytes

    def write(
        self, room: Tensor, tensor: Tensor, kept: Kept | None
    ) -> tuple[int, Kept | None] | None:
        """See Codec."""
        if tensor.dtype not in _FLOATS or tensor.numel() == 0:
            return None
        live = support_of(tensor)  # of a gradient: None
        tensor = tensor.detach().contiguous()
        if kept is not None and (not kept.guards or bool(tensor.isfinite().all())):
            return _put(room, tensor, kept.pattern, _HEAD, _REPLIES), None
        end = _HEAD + _bitmap_bytes(tensor.numel())
        bitmap = room[_HEAD:end]
        pattern = SparsityPattern.from_nonzeros(tensor, bitmap)
        if live is not None and live.entries is not None:
            others = SparsityPattern.from_nonzeros(live.entries.reshape(tensor.shape))
            both = SparsityPattern.from_bitmap(bitmap | others.bitmap, tensor.shape)
            if 2 * both.nnz > pattern.nnz + tensor.numel():  # a whole gradient is less
                live = None
            else:
                bitmap.copy_(both.bitmap)
                pattern = both
        if end + pattern.nnz * tensor.itemsize >= tensor.nbytes:
            return None
        if live is None:
            return _put(room, tensor, pattern, end, 0), None
        pattern.bitmap = bitmap.clone()  # the message may be gone when the gradient comes
        flags = _KEEPS | (_GUARDS if live.guards else 0)
        return _put(room, tensor, pattern, end, flags), Kept(pattern, live.guards)

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, Kept | None]:
        """See Codec."""
        if data.numel() < _HEAD:
            raise MessageError(f"a tensor of {dtype} and shape {shape} in {data.numel()} bytes")
        nnz, flags = data[:_HEAD].view(torch.int64).tolist()
        start = _HEAD
        if flags & _REPLIES:
            if kept is None or tuple(kept.pattern.shape) != shape:
                raise MessageError(f"the gradient of shape {shape} answers another tensor")
            pattern = kept.pattern
        else:
            start += _bitmap_bytes(math.prod(shape))
            try:
                pattern = SparsityPattern.from_bitmap(data[_HEAD:start].clone(), shape)
            except ValueError as error:
                raise MessageError(f"the bitmap of a message is damaged: {error}") from error
        if pattern.nnz != nnz or data.numel() != start + nnz * dtype.itemsize:
            raise MessageError(
                f"a message has {data.numel() - start} bytes of values and says it has {nnz} of "
                f"{dtype}; its bitmap has {pattern.nnz} bits set"
            )
        tensor = expand(data[start:].view(dtype), pattern, out=torch.empty(shape, dtype=dtype))
        keeps = Kept(pattern, bool(flags & _GUARDS)) if flags & _KEEPS else None
        return tensor, keeps


def _put(room: Tensor, tensor: Tensor, pattern: SparsityPattern, start: int, flags: int) -> int:
    """Write head and values; returns where they end."""
    room[:_HEAD].view(torch.int64).copy_(torch.tensor([pattern.nnz, flags]))
    end = start + pattern.nnz * tensor.itemsize
    pack(tensor, pattern, out=room[start:end].view(tensor.dtype))
    return end


def _bitmap_bytes(numel: int) -> int:
    return -(-numel // 64) * 8
