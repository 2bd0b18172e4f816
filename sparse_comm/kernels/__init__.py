"""Pack and expand: between a dense tensor and the 1-D tensor of its unpruned values.

    values = pack(dense, pattern)
    dense = expand(values, pattern)

Both are ``torch.library`` operators, so they trace under ``torch.compile(fullgraph=True)`` and
``torch.export``, and each is the other's gradient. Native code does the work where it is built,
torch elsewhere, with the same bits: ``describe()`` tells which, ``use_backend`` chooses. This
package knows a pattern only by its fields (``bitmap``, ``offsets``, ``shape``, ``nnz``) and imports
nothing else of the project.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sparse_comm.kernels import ops
from sparse_comm.kernels.backends import describe, nonzeros_into, observe, use_backend
from sparse_comm.kernels.reference import BLOCK, block_offsets, unpack_bits

__all__ = [
    "BLOCK",
    "Pattern",
    "block_offsets",
    "describe",
    "expand",
    "nonzeros_into",
    "observe",
    "pack",
    "unpack_bits",
    "use_backend",
]


class Pattern(Protocol):
    """What pack and expand need of a ``SparsityPattern``."""

    bitmap: Tensor
    offsets: Tensor
    nnz: int

    @property
    def shape(self) -> torch.Size: ...


def pack(
    dense: Tensor, pattern: Pattern, out: Tensor | None = None, *, accumulate: bool = False
) -> Tensor:
    """The unpruned entries of ``dense``, in row-major order.

    Args:
        dense: tensor of the pattern's shape, any real dtype and memory layout, on its device.
        pattern: which entries are unpruned.
        out: contiguous tensor of shape ``(nnz,)`` to write to, without gradient; values are
            converted to its dtype (rounded to nearest even; NaN becomes the quiet NaN of it).
        accumulate: add to ``out`` instead of overwriting it; in fp32, or in fp64 if one of the two
            is fp64, then rounded to out's dtype.

    Returns:
        Tensor of shape ``(nnz,)``: ``out``, or a new one of dense's dtype, differentiable.

    Raises:
        ValueError: wrong shape or device of ``dense`` or ``out``; the two share memory;
            ``accumulate`` without ``out``.

    Source: SAMO (Singh & Bhatele, IPDPS 2023), section III; the bitmap is ours.
    """
    if dense.shape != pattern.shape:
        raise ValueError(
            f"pack: the pattern has shape {tuple(pattern.shape)}, the tensor {tuple(dense.shape)}"
        )
    _check_device("pack", dense, pattern)
    if out is None:
        if accumulate:
            raise ValueError("pack: accumulate=True adds to out, but no out was given")
        return ops.pack(dense, pattern.bitmap, pattern.offsets, pattern.nnz, None)
    _check_out("pack", out, torch.Size([pattern.nnz]), dense)
    with torch.no_grad():
        ops.pack_into(out, dense, pattern.bitmap, pattern.offsets, accumulate)
    return out


def expand(
    values: Tensor, pattern: Pattern, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The dense tensor whose unpruned entries are ``values`` and whose others are zero.

    Args:
        values: tensor of shape ``(nnz,)``, any real dtype, on the pattern's device.
        pattern: where the values stand.
        out: contiguous tensor of the pattern's shape to write to, without gradient.
        dtype: dtype of the new tensor; that of ``values`` if not given. With ``out``, its dtype
            counts. Conversion rounds to nearest even.

    Returns:
        Tensor of the pattern's shape: ``out``, or a new one, differentiable.

    Raises:
        ValueError: wrong shape or device of ``values`` or ``out``; the two share memory;
            ``dtype`` unlike out's.

    Source: SAMO (Singh & Bhatele, IPDPS 2023), section III; the bitmap is ours.
    """
    if tuple(values.shape) != (pattern.nnz,):
        raise ValueError(
            f"expand: the pattern has {pattern.nnz} unpruned entries, "
            f"the values have shape {tuple(values.shape)}"
        )
    _check_device("expand", values, pattern)
    if out is None:
        return ops.expand(values, pattern.bitmap, pattern.offsets, pattern.shape, dtype)
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"expand: dtype is {dtype}, but out has {out.dtype}")
    _check_out("expand", out, pattern.shape, values)
    with torch.no_grad():
        ops.expand_into(out, values, pattern.bitmap, pattern.offsets)
    return out


def _check_device(what: str, tensor: Tensor, pattern: Pattern) -> None:
    if tensor.device != pattern.bitmap.device and not tensor.is_meta:
        raise ValueError(
            f"{what}: the tensor is on {tensor.device}, the pattern on {pattern.bitmap.device}; "
            "move the pattern with pattern.to(device)"
        )


def _check_out(what: str, out: Tensor, shape: torch.Size, source: Tensor) -> None:
    if out.shape != shape or not out.is_contiguous() or out.device != source.device:
        raise ValueError(
            f"{what}: out must be contiguous, of shape {tuple(shape)}, on {source.device}; got "
            f"{'contiguous' if out.is_contiguous() else 'strided'} {tuple(out.shape)} "
            f"on {out.device}"
        )
    if out.is_meta or source.is_meta:
        raise ValueError(f"{what}: out cannot be written on the meta device")
    if _first_byte(out) < _end(source) and _first_byte(source) < _end(out):
        raise ValueError(f"{what}: out shares memory with what is read; clone one of them")


def _first_byte(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _end(tensor: Tensor) -> int:
    """One past the last byte that a tensor can reach."""
    if tensor.numel() == 0:
        return tensor.data_ptr()
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr() + (last + 1) * tensor.itemsize
