"""The native back-end: C on CPU tensors of fp64, fp32, fp16 and bf16, from csrc/.

Built when the package is installed, where there is a C compiler; ``MISSING`` says why it is not
there otherwise. It holds a portable version of each kernel and faster ones for AVX2 and AVX-512,
and takes the best that the processor has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

__all__ = [
    "MISSING",
    "expand_into",
    "instruction_set",
    "instruction_sets",
    "nonzeros_into",
    "pack_into",
    "takes",
    "takes_entries",
    "use_instruction_set",
]

MISSING: str | None = None
try:
    from sparse_comm.kernels import _native  # type: ignore[attr-defined]
except ImportError as error:
    _native = None
    MISSING = (
        f"the extension sparse_comm.kernels._native cannot be imported ({error}): it is built when "
        "sparse_comm is installed on a machine with a C compiler"
    )

# The order of the enum in csrc/convert.h.
_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_PLAIN = (Tensor, nn.Parameter)
_using = -1


def takes(source: Tensor, out: Tensor) -> bool:
    """Whether this back-end can pack or expand ``source`` into ``out``.

    Subclasses may be anything: a compact weight's view writes elsewhere than to its address.
    """
    return (
        _native is not None
        and type(source) in _PLAIN
        and type(out) in _PLAIN
        and source.dtype in _CODES
        and out.dtype in _CODES
        and source.device.type == "cpu"
        and source.data_ptr() % source.itemsize == 0
        and out.data_ptr() % out.itemsize == 0
    )


def pack_into(
    out: Tensor, dense: Tensor, bitmap: Tensor, offsets: Tensor, accumulate: bool = False
) -> None:
    """As in ``reference``."""
    _run(_native.pack, out, dense, bitmap, offsets, dense.numel(), out.numel(), accumulate)


def expand_into(out: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor) -> None:
    """As in ``reference``."""
    _run(_native.expand, out, values, bitmap, offsets, out.numel(), values.numel())


def takes_entries(source: Tensor) -> bool:
    """Whether this back-end can look for the non-zeros of ``source``, whatever its dtype means."""
    return (
        _native is not None
        and type(source) in _PLAIN
        and source.itemsize in (2, 4, 8)
        and source.device.type == "cpu"
        and source.data_ptr() % source.itemsize == 0
    )


def nonzeros_into(bitmap: Tensor, offsets: Tensor, source: Tensor) -> int:
    """As in ``reference``."""
    source = source.contiguous().resolve_neg()
    found: int = _native.nonzeros(
        source.data_ptr(), source.itemsize, source.numel(), bitmap.data_ptr(), offsets.data_ptr()
    )
    _written(bitmap)
    _written(offsets)
    return found


def _run(
    kernel: Callable[..., None],
    out: Tensor,
    source: Tensor,
    bitmap: Tensor,
    offsets: Tensor,
    numel: int,
    nnz: int,
    *flags: bool,
) -> None:
    source = source.contiguous().resolve_neg()
    try:
        kernel(
            out.data_ptr(),
            _CODES[out.dtype],
            source.data_ptr(),
            _CODES[source.dtype],
            bitmap.data_ptr(),
            offsets.data_ptr(),
            numel,
            nnz,
            torch.get_num_threads(),
            *flags,
        )
    finally:  # it may have written some of it when it finds that the pattern is unsound
        _written(out)


def _written(out: Tensor) -> None:
    """Tell autograd, which sees no writes through an address."""
    if not out.is_inference():
        increment_version(out)


def instruction_sets() -> list[str]:
    """Those that this processor has of "baseline", "avx2" and "avx512", best last."""
    return _native.instruction_sets() if _native is not None else []


def instruction_set() -> str | None:
    """The one in use."""
    return instruction_sets()[_using] if _native is not None else None


def use_instruction_set(name: str) -> None:
    """Use another than the best, to compare them.

    Raises:
        ValueError: this processor does not have it.
    """
    global _using
    if name not in instruction_sets():
        raise ValueError(f"the native kernels run on {instruction_sets()} here, not on {name!r}")
    _using = instruction_sets().index(name)
    _native.use(_using)
