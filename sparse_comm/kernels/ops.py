"""The custom operators ``sparse_comm::pack``, ``expand`` and ``refresh``.

Registered with the bare ``torch.library`` functions where the operator runs in every layer: the
``custom_op`` decorator adds checks of some 20 us a call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_comm.kernels.backends import expand_into, pack_into

__all__ = ["expand", "expand_into", "pack", "pack_into", "refresh", "refresh_now"]

_LIB = torch.library.Library("sparse_comm", "DEF")
_LIB.define(
    "pack(Tensor dense, Tensor bitmap, Tensor offsets, SymInt nnz, ScalarType? dtype) -> Tensor"
)
_LIB.define(
    "expand(Tensor values, Tensor bitmap, Tensor offsets, SymInt[] shape, ScalarType? dtype)"
    " -> Tensor"
)


def _pack(
    dense: Tensor, bitmap: Tensor, offsets: Tensor, nnz: int, dtype: torch.dtype | None
) -> Tensor:
    out = dense.new_empty(nnz, dtype=dtype or dense.dtype)
    pack_into(out, dense, bitmap, offsets)
    return out


def _expand(
    values: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype | None,
) -> Tensor:
    out = values.new_empty(shape, dtype=dtype or values.dtype)
    expand_into(out, values, bitmap, offsets)
    return out


for _name, _function in (("pack", _pack), ("expand", _expand)):
    for _key in ("CPU", "CUDA", "XPU"):
        _LIB.impl(_name, _function, _key)


@torch.library.register_fake("sparse_comm::pack")
def _(dense: Tensor, bitmap: Tensor, offsets: Tensor, nnz: int, dtype: Any) -> Tensor:
    return dense.new_empty(nnz, dtype=dtype or dense.dtype)


@torch.library.register_fake("sparse_comm::expand")
def _(values: Tensor, bitmap: Tensor, offsets: Tensor, shape: Any, dtype: Any) -> Tensor:
    return values.new_empty(shape, dtype=dtype or values.dtype)


def _keep_pattern(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, ctx.bitmap, ctx.offsets, ctx.size, ctx.out_dtype = inputs
    ctx.shape, ctx.dtype = source.shape, source.dtype


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return expand(grad, ctx.bitmap, ctx.offsets, ctx.shape, ctx.dtype), None, None, None, None


def _expand_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return pack(grad, ctx.bitmap, ctx.offsets, ctx.shape[0], ctx.dtype), None, None, None, None


torch.library.register_autograd("sparse_comm::pack", _pack_backward, setup_context=_keep_pattern)
torch.library.register_autograd(
    "sparse_comm::expand", _expand_backward, setup_context=_keep_pattern
)


pack = torch.ops.sparse_comm.pack.default
expand = torch.ops.sparse_comm.expand.default


class _Functorch(torch.autograd.Function):
    """The operators where registered autograd falls short: ``torch.func`` and forward mode.

    ``vmap`` makes one call a batch element: correct, and per-sample gradients are rare.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep_pattern(ctx, inputs, output)


class Pack(_Functorch):
    """``sparse_comm::pack`` for ``torch.func``."""

    @staticmethod
    def forward(dense: Tensor, bitmap: Tensor, offsets: Tensor, nnz: int, dtype: Any) -> Tensor:
        return pack(dense, bitmap, offsets, nnz, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dense = Expand.apply(grad, ctx.bitmap, ctx.offsets, ctx.shape, ctx.dtype)
        return dense, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return Pack.apply(tangent, ctx.bitmap, ctx.offsets, ctx.size, ctx.out_dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(Pack, in_dims, *args)


class Expand(_Functorch):
    """``sparse_comm::expand`` for ``torch.func``."""

    @staticmethod
    def forward(values: Tensor, bitmap: Tensor, offsets: Tensor, shape: Any, dtype: Any) -> Tensor:
        return expand(values, bitmap, offsets, shape, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values = Pack.apply(grad, ctx.bitmap, ctx.offsets, ctx.shape[0], ctx.dtype)
        return values, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return Expand.apply(tangent, ctx.bitmap, ctx.offsets, ctx.size, ctx.out_dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _batched(Expand, in_dims, *args)


def _batched(function: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
    source, *rest = args
    parts = source.movedim(in_dims[0], 0).unbind(0)
    return torch.stack([function.apply(part, *rest) for part in parts]), 0


# The values a cache was last brought up to date with, by its stamp. Held so that their memory
# cannot be reused by other values of the same version: an equal stamp then means equal values.
_SEEN: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_REFRESHING = threading.Lock()


def refresh_now(
    cache: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, stamp: Tensor
) -> None:
    """Expand ``values`` into ``cache`` if they changed since the last time.

    Always, if nothing would tell: other processes write to shared memory, and inference tensors
    are written, without a new version.

    Args:
        cache: dense tensor of the parameter's shape, of any layout; written.
        values: tensor of shape ``(nnz,)``.
        bitmap: the pattern's.
        offsets: the pattern's.
        stamp: int64, CPU, (version, address) of the values that ``cache`` holds; written.
            Fill it with -1 to force a refresh.

    Source: ours.
    """
    counted = not values.is_inference() and (values.device.type != "cpu" or not values.is_shared())
    now = [values._version if counted else -1, values.data_ptr()]
    if counted and stamp.tolist() == now:
        return
    with _REFRESHING, torch.no_grad():  # expanding zeroes first, which another thread could read
        if counted and stamp.tolist() == now:
            return
        if cache.is_contiguous():
            expand_into(cache, values, bitmap, offsets)
        else:
            cache.copy_(_expand(values, bitmap, offsets, cache.shape, cache.dtype))
        stamp.copy_(torch.tensor(now, device="cpu"))
        _SEEN[stamp] = values.detach()


def expire_copies(stepped: Iterable[Tensor]) -> None:
    """Have the caches of values that may be copies of what an optimizer stepped refreshed.

    Values that are pieces of a larger buffer, whose owner writes them, or as large as one of the
    tensors and of a narrower dtype: no version tells that they were written.
    """
    sizes: dict[torch.Size, int] = {}  # the widest of each shape
    for tensor in stepped:
        sizes[tensor.shape] = max(sizes.get(tensor.shape, 0), tensor.itemsize)
    with _REFRESHING:
        for stamp, values in list(_SEEN.items()):
            is_piece = values.untyped_storage().nbytes() > values.nbytes
            if is_piece or sizes.get(values.shape, 0) > values.itemsize:
                stamp.fill_(-1)


@torch.library.custom_op("sparse_comm::refresh", mutates_args=("cache", "stamp"))
def refresh(cache: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, stamp: Tensor) -> None:
    """``refresh_now`` as an operator: reading a version in Python breaks a full graph."""
    refresh_now(cache, values, bitmap, offsets, stamp)


@refresh.register_fake
def _(cache: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, stamp: Tensor) -> None:
    return None
