"""What memory can do at best: copies, a fill and a read to hold pack and expand against.

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

from torch import Tensor

SOURCE = Path(__file__).with_name("floors.c")
ALIGNMENT = 64  # bytes, that floors.c relies on; torch allocates so on the CPU

PLAIN_COPY = "non-temporal copy, plain"
FAST_COPY = "non-temporal copy, two streams"
FILL = "non-temporal zero-fill"
READ = "read, two streams"
LIBC_COPY, LIBC_FILL = "libc memmove", "libc memset"


@dataclass(frozen=True)
class Floors:
    """Operations on whole contiguous tensors; copies are called with to and from."""

    copies: dict[str, Callable[[Tensor, Tensor], None]]
    fill_name: str
    fill: Callable[[Tensor], None]
    read: Callable[[Tensor], None] | None
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


def _compiled(compiler: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix="sparse-comm-") as folder:
        library = Path(folder) / "floors.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))  # which stays loaded when its file is gone


def _of_source(library: ctypes.CDLL) -> Floors:
    address, size = ctypes.c_void_p, ctypes.c_size_t
    library.copy_plain.argtypes = library.copy_two_streams.argtypes = [address, address, size]
    library.read_two_streams.argtypes = library.fill_zero.argtypes = [address, size]

    def copy_with(function: Callable) -> Callable[[Tensor, Tensor], None]:
        return lambda to, source: function(_of(to), _of(source), source.nbytes)

    return Floors(
        {
            FAST_COPY: copy_with(library.copy_two_streams),
            PLAIN_COPY: copy_with(library.copy_plain),
        },
        FILL,
        lambda to: library.fill_zero(_of(to), to.nbytes),
        lambda source: library.read_two_streams(_of(source), source.nbytes),
        "streaming stores (SSE2), compiled for this run",
    )


def _of_libc(reason: str) -> Floors:
    libc = ctypes.CDLL(None)
    address, size = ctypes.c_void_p, ctypes.c_size_t
    libc.memmove.argtypes = [address, address, size]
    libc.memset.argtypes = [address, ctypes.c_int, size]
    return Floors(
        {LIBC_COPY: lambda to, source: libc.memmove(_of(to), _of(source), source.nbytes)},
        LIBC_FILL,
        lambda to: libc.memset(_of(to), 0, to.nbytes),
        None,
        f"libc's memmove and memset, which may be slower than memory allows, because {reason}",
    )


def _of(tensor: Tensor) -> int:
    """The address, checked: C takes it on trust."""
    if not tensor.is_contiguous() or tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"a floor needs a contiguous tensor, aligned to {ALIGNMENT} bytes")
    return tensor.data_ptr()
