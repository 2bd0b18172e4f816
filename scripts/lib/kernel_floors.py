"""What memory can do at best: copies, fills and reads to hold pack and expand against.

torch's ``copy_`` and ``zero_`` and libc's ``memcpy`` are not at the floor: their stores read each
line before they overwrite it. So floors.c is compiled here, for the one run.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("floors.c")
ALIGNMENT = 64  # bytes, that floors.c relies on; torch allocates so on the CPU
PERIOD = 8192  # bytes that a fill repeats: they stay in the first-level cache

COPY, ZERO_FILL, DATA_FILL, READ = "copy", "zero-fill", "fill with such data", "read"
PLAIN, TWO_STREAMS = "plain", "two streams"
WIDE, AHEAD = "64 bytes at a time", "64 bytes at a time, asked for ahead"
LIBC = "libc"


@dataclass(frozen=True)
class Floors:
    """Operations on whole contiguous tensors, by how they are done.

    Attributes:
        copies: called with to and from.
        fills: called with to and with what to repeat in it, of PERIOD bytes.
        reads: called with the tensor; none where nothing can be compiled.
        about: what was measured, in words.
    """

    copies: dict[str, Callable[[Tensor, Tensor], None]]
    fills: dict[str, Callable[[Tensor, Tensor], None]]
    reads: dict[str, Callable[[Tensor], None]]
    about: str


def load() -> Floors:
    """Those of floors.c, or of libc where that cannot be: ``about`` says which and why."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return _of_libc(f"{SOURCE.name} is for x86-64, this is {platform.machine()}")
    compiler = shutil.which(os.environ.get("CC", "cc").split()[0])
    if compiler is None:
        return _of_libc("there is no C compiler")
    try:
        return _of_source(_compiled(compiler))
    except (OSError, subprocess.CalledProcessError) as error:
        return _of_libc(f"{SOURCE.name} could not be compiled: {error}")


def content(dtype: torch.dtype, density: float) -> Tensor:
    """What a fill repeats: PERIOD bytes of numbers, that share of them unlike zero."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(PERIOD // dtype.itemsize, generator=generator)
    numbers[torch.rand(numbers.shape, generator=generator) >= density] = 0
    return numbers.to(dtype)


def _compiled(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder:
        library = Path(folder) / "floors.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))  # which stays loaded when its file is gone


def _of_source(library: ctypes.CDLL) -> Floors:
    ways = {PLAIN: "plain"} | ({WIDE: "wide"} if library.has_wide() else {})
    both = ways | ({AHEAD: "ahead"} if WIDE in ways else {}) | {TWO_STREAMS: "two_streams"}

    def each(what: str, among: dict[str, str], *types: type) -> dict[str, Callable]:
        found = {}
        for way, name in among.items():
            found[way] = getattr(library, f"{what}_{name}")
            found[way].argtypes = types
        return found

    address, size = ctypes.c_void_p, ctypes.c_size_t

    def copy_by(function: Callable) -> Callable[[Tensor, Tensor], None]:
        return lambda to, source: function(_of(to), _of(source), source.nbytes)

    def fill_by(function: Callable) -> Callable[[Tensor, Tensor], None]:
        return lambda to, given: function(_of(to), to.nbytes, _of(given), given.nbytes)

    def read_by(function: Callable) -> Callable[[Tensor], None]:
        return lambda source: function(_of(source), source.nbytes)

    copies = each("copy", both, address, address, size)
    fills = each("fill", ways, address, size, address, size)
    reads = each("read", both, address, size)
    return Floors(
        {way: copy_by(function) for way, function in copies.items()},
        {way: fill_by(function) for way, function in fills.items()},
        {way: read_by(function) for way, function in reads.items()},
        f"streaming stores, compiled for this run: {'; '.join(both)}",
    )


def _of_libc(reason: str) -> Floors:
    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.memmove.argtypes = [address, address, size]
    libc.memset.argtypes = [address, ctypes.c_int, size]

    def fill(to: Tensor, given: Tensor) -> None:
        if given.any():
            whole = to.nbytes // PERIOD * PERIOD
            for start in range(0, whole, PERIOD):
                libc.memmove(_of(to) + start, _of(given), PERIOD)
            libc.memmove(_of(to) + whole, _of(given), to.nbytes - whole)
        else:
            libc.memset(_of(to), 0, to.nbytes)

    return Floors(
        {LIBC: lambda to, source: libc.memmove(_of(to), _of(source), source.nbytes)},
        {LIBC: fill},
        {},
        f"libc's memmove and memset, which may be slower than memory allows, because {reason}",
    )


def _of(tensor: Tensor) -> int:
    """The address, checked: C takes it on trust."""
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"a floor needs a contiguous tensor, aligned to {ALIGNMENT} bytes")
    return tensor.data_ptr()
