"""The back-ends of pack and expand, the checks before each call, and the choice between them.

A back-end is a module with ``takes(source, out)``, ``pack_into`` and ``expand_into``, and with
``takes_entries(source)`` and ``nonzeros_into``. The first in ``BACKENDS`` that takes a call gets
it; all give the same bits.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_comm.kernels import native, reference
from sparse_comm.kernels.reference import BLOCK

__all__ = [
    "BACKENDS",
    "describe",
    "expand_into",
    "nonzeros_into",
    "observe",
    "pack_into",
    "use_backend",
]

ENVIRONMENT = "SPARSE_COMM_KERNELS"
Observer = Callable[[str, float], None]


class Backend(Protocol):
    """What a back-end has; tensors come checked, ``out`` contiguous."""

    def takes(self, source: Tensor, out: Tensor) -> bool: ...

    def pack_into(
        self, out: Tensor, dense: Tensor, bitmap: Tensor, offsets: Tensor, accumulate: bool = False
    ) -> None: ...

    def expand_into(self, out: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor) -> None: ...

    def takes_entries(self, source: Tensor) -> bool: ...

    def nonzeros_into(self, bitmap: Tensor, offsets: Tensor, source: Tensor) -> int: ...


BACKENDS: dict[str, Backend] = {"native": native, "reference": reference}
_order: list[Backend] = list(BACKENDS.values())
_observers: list[Observer] = []


def use_backend(name: str | None) -> None:
    """Use one back-end for every call that it takes, and the reference for others.

    The environment variable ``SPARSE_COMM_KERNELS`` does the same from the start.

    Args:
        name: ``"native"``, ``"reference"``, or None for the best.

    Raises:
        ValueError: there is none of that name, or it is not built.
    """
    global _order
    if name is None:
        _order = list(BACKENDS.values())
        return
    if name not in BACKENDS:
        raise ValueError(f"there is no back-end {name!r}; there are {', '.join(BACKENDS)}")
    if name == "native" and native.MISSING:
        raise ValueError(f"the native back-end is not there: {native.MISSING}")
    _order = [BACKENDS[name], reference]


def describe() -> dict[str, Any]:
    """Which back-end CPU tensors get.

    Returns:
        ``backend``: "native" or "reference"; ``instruction_set``: "avx512", "avx2", "baseline" or
        None; ``threads``: how many a large call uses at most; ``reason``: why native is not in use,
        or None.
    """
    is_native = native in _order and native.MISSING is None
    reason = native.MISSING
    if not is_native and reason is None:
        reason = f"the reference was asked for, by use_backend or {ENVIRONMENT}"
    return {
        "backend": "native" if is_native else "reference",
        "instruction_set": native.instruction_set() if is_native else None,
        "threads": torch.get_num_threads(),
        "reason": reason,
    }


def observe(callback: Observer) -> Callable[[], None]:
    """Have ``callback(name, seconds)`` called after each call on the CPU.

    Names are ``"pack"``, ``"expand"`` and ``"nonzeros"``. Costs nothing while nobody observes.

    Returns:
        A function that ends it.
    """
    _observers.append(callback)

    def stop() -> None:
        if callback in _observers:
            _observers.remove(callback)

    return stop


def pack_into(
    out: Tensor, dense: Tensor, bitmap: Tensor, offsets: Tensor, accumulate: bool = False
) -> None:
    """Write the unpruned entries of ``dense`` to ``out``, converted to its dtype; or add them.

    Raises:
        ValueError: sizes, dtypes or devices do not fit, or bitmap and offsets disagree.
    """
    _check("pack", dense.numel(), out.numel(), out, dense, bitmap, offsets)
    backend = _choose(dense, out)
    start = time.perf_counter() if _observers else 0.0
    backend.pack_into(out, dense, bitmap, offsets, accumulate)
    for callback in tuple(_observers):
        callback("pack", time.perf_counter() - start)


def expand_into(out: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor) -> None:
    """Write ``values`` to their places in ``out``, converted to its dtype, and zeros elsewhere.

    Raises:
        ValueError: sizes, dtypes or devices do not fit, or bitmap and offsets disagree.
    """
    _check("expand", out.numel(), values.numel(), out, values, bitmap, offsets)
    backend = _choose(values, out)
    start = time.perf_counter() if _observers else 0.0
    backend.expand_into(out, values, bitmap, offsets)
    for callback in tuple(_observers):
        callback("expand", time.perf_counter() - start)


def nonzeros_into(bitmap: Tensor, offsets: Tensor, source: Tensor) -> int:
    """Write the bitmap and the offsets of the entries of ``source`` that have any bit set.

    Returns:
        How many there are.

    Raises:
        ValueError: sizes, dtypes or devices do not fit.
    """
    _check("nonzeros", source.numel(), 0, bitmap, source, bitmap, offsets)
    if source.is_complex() or source.is_quantized or source.is_meta:
        raise ValueError(
            f"nonzeros: the entries must be real numbers, got {source.dtype} on {source.device}"
        )
    backend = next((b for b in _order if b.takes_entries(source)), reference)
    start = time.perf_counter() if _observers else 0.0
    found = backend.nonzeros_into(bitmap, offsets, source)
    for callback in tuple(_observers):
        callback("nonzeros", time.perf_counter() - start)
    return found


def _choose(source: Tensor, out: Tensor) -> Backend:
    if native.MISSING and not _warned and native in _order and source.device.type == "cpu":
        _warn_once()
    for backend in _order:
        if backend.takes(source, out):
            return backend
    return reference  # which takes everything


_warned = False


def _warn_once() -> None:
    global _warned
    _warned = True
    warnings.warn(
        f"pack and expand run in torch, several times slower than native code: {native.MISSING}. "
        f"Install a C compiler, then sparse_comm again; or set {ENVIRONMENT}=reference to go on "
        "without this message",
        stacklevel=2,
    )


def _check(
    what: str,
    numel: int,
    nnz: int,
    out: Tensor,
    source: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
) -> None:
    """Whatever is wrong raises here: a back-end takes addresses and sizes on trust."""
    if (
        bitmap.dtype is not torch.uint8
        or offsets.dtype is not torch.int64
        or bitmap.numel() != -(-numel // 64) * 8
        or offsets.numel() != -(-numel // BLOCK) + 1
        or not bitmap.is_contiguous()
        or not offsets.is_contiguous()
        or offsets.data_ptr() % offsets.itemsize
    ):
        raise ValueError(
            f"{what}: a pattern of {numel} entries has a contiguous uint8 bitmap of "
            f"{-(-numel // 64) * 8} bytes and {-(-numel // BLOCK) + 1} aligned int64 offsets; got "
            f"{bitmap.numel()} of {bitmap.dtype} and {offsets.numel()} of {offsets.dtype}"
        )
    if nnz > numel:
        raise ValueError(f"{what}: {nnz} values for {numel} entries")
    if not out.is_contiguous():
        raise ValueError(f"{what}: out must be contiguous, got strides {out.stride()}")
    device = source.device
    if out.device != device or bitmap.device != device or offsets.device != device:
        raise ValueError(
            f"{what}: all tensors must be on one device; the source is on {device}, out on "
            f"{out.device}, the pattern on {bitmap.device}"
        )
    if device.type == "cpu":
        for tensor in (out, source, bitmap, offsets):
            _check_memory(what, tensor)


def _check_memory(what: str, tensor: Tensor) -> None:
    """Addresses are those of elements: not so for DTensors, or after ``storage.resize_(0)``."""
    if tensor.numel() == 0:
        return
    storage = tensor.untyped_storage()
    if tensor.is_contiguous():
        end = tensor.numel()
    else:
        end = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + end) * tensor.itemsize
    try:
        is_there = storage.data_ptr() != 0 and needed <= storage.nbytes()
    except RuntimeError:  # of wrappers, whose storage has no bytes
        is_there = False
    if not is_there:
        raise ValueError(
            f"{what}: a {type(tensor).__name__} of shape {tuple(tensor.shape)} has no memory "
            f"of its own, or too little ({needed} bytes); of a DTensor pass to_local(), of sharded "
            "parameters what unshard() gives"
        )


use_backend(os.environ.get(ENVIRONMENT) or None)
