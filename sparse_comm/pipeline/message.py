"""The bytes of a message between two stages: a header, an entry a tensor, what a codec wrote of it.

    message, mine = encode([y], Zeros())                # on the stage that writes
    (y,), theirs = decode(message)                      # on the stage that reads
    back, _ = encode([gradient], Zeros(), theirs)       # its gradient, on the way back
    (gradient,), _ = decode(back, mine)

A message says what it holds: the reader needs neither shapes nor dtypes nor the writer's codec, so
that shapes may change, and a writer may take another codec for each tensor.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .codec import Codec, Kept, MessageError
from .dense import Dense
from .zeros import Zeros

__all__ = ["HEADER", "Header", "announcement", "decode", "encode", "read_header"]

_MAGIC = b"SpCm"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHIIQ")  # magic, version, flags, tensors, number, checksum, bytes
_ENTRY = struct.Struct("<BBBxIQ")  # codec, dtype, dimensions, unused, bytes
_TAIL = struct.Struct("<I4s")  # number, magic: a message that was cut short lacks it
_CHECKED, _ANNOUNCED = 1, 2
_ALIGNMENT = 64  # of what codecs write: a cache line
HEADER = 64  # bytes of a message that is nothing but a header

_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
]
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_ABSENT, _OWN = 254, 255  # in a codec's place: no tensor; a codec that is none of these
_CODECS: list[Codec] = [Dense(), Zeros()]
_CODEC_CODES = {type(codec): code for code, codec in enumerate(_CODECS)}
_DENSE = _CODECS[0]


@dataclass(frozen=True)
class Header:
    """The first bytes of a message.

    Attributes:
        tensors: how many it holds, absent ones included.
        number: the writer's, of the micro-batch.
        nbytes: of the whole message.
        announces: whether the message itself is still to come, as it is too large for the reader.
        checksum: CRC-32 of the message, its own field left out; None if the writer made none.
    """

    tensors: int
    number: int
    nbytes: int
    announces: bool
    checksum: int | None


def encode(
    tensors: Sequence[Tensor | None],
    codec: Codec,
    kept: Sequence[Kept | None] | None = None,
    *,
    number: int = 0,
    checksum: bool = False,
) -> tuple[Tensor, list[Kept | None]]:
    """Write tensors into one message.

    Args:
        tensors: of any shapes and dtypes; None where there is none (an input without gradient).
        codec: of those that it can make smaller; the others go dense.
        kept: of gradients: what ``decode`` gave with the tensors whose gradients they are.
        number: of the micro-batch, 0 to 2**32 - 1, for the reader to check.
        checksum: whether to add one, at some 0.5 ms a MB.

    Returns:
        The message: uint8, 1-D, on the CPU; and what ``decode`` of the answer needs.

    Source: ours.
    """
    kept = kept or [None] * len(tensors)
    described = [_describe(tensor) for tensor in tensors]
    starts = _HEADER.size + sum(_ENTRY.size + 8 * len(shape) for _, shape in described)
    most = sum(_ALIGNMENT + max(codec.bound(t), t.nbytes) for t in tensors if t is not None)
    message = torch.empty(starts + most + _ALIGNMENT + _TAIL.size, dtype=torch.uint8)
    entries, at = b"", starts
    mine: list[Kept | None] = []
    for tensor, before, (code, shape) in zip(tensors, kept, described, strict=True):
        if tensor is None:
            entries += _ENTRY.pack(_ABSENT, 0, 0, 0, 0)
            mine.append(None)
            continue
        at = _aligned(at)
        used, nbytes, keeps = _write(codec, message[at:], tensor, before)
        entries += _ENTRY.pack(used, code, len(shape), 0, nbytes)
        entries += struct.pack(f"<{len(shape)}q", *shape)
        mine.append(keeps)
        at += nbytes
    _put(message[at:], _TAIL.pack(number, _MAGIC))
    at += _TAIL.size
    message = message[:at]
    head = [_MAGIC, _VERSION, _CHECKED if checksum else 0, len(tensors), number, 0, at]
    _put(message, _HEADER.pack(*head) + entries)
    if checksum:
        head[5] = zlib.crc32(message.numpy().data)
        _put(message, _HEADER.pack(*head))
    return message, mine


def _write(
    codec: Codec, room: Tensor, tensor: Tensor, kept: Kept | None
) -> tuple[int, int, Kept | None]:
    """Codec that was used, bytes that it wrote, what it keeps."""
    written = codec.write(room, tensor, kept)
    if written is not None:
        return _CODEC_CODES.get(type(codec), _OWN), *written
    return 0, tensor.nbytes, _DENSE.write(room, tensor, kept)[1]  # type: ignore[index]


def announcement(message: Tensor) -> Tensor:
    """What is sent ahead of a message that is larger than the reader expects: HEADER bytes."""
    short = torch.zeros(HEADER, dtype=torch.uint8)
    magic, version, flags, *rest = _HEADER.unpack(message[: _HEADER.size].numpy().tobytes())
    _put(short, _HEADER.pack(magic, version, flags | _ANNOUNCED, *rest))
    return short


def read_header(message: Tensor) -> Header:
    """The header of a message.

    Raises:
        MessageError: the bytes are no message's, or that of another version of sparse_comm.
    """
    if message.numel() < _HEADER.size:
        raise MessageError(f"a message has {_HEADER.size} bytes at least, got {message.numel()}")
    raw = message[: _HEADER.size].numpy().tobytes()
    magic, version, flags, tensors, number, checksum, nbytes = _HEADER.unpack(raw)
    if magic != _MAGIC or version != _VERSION:
        raise MessageError(
            f"a message starts with {_MAGIC!r} and version {_VERSION}, got {magic!r} and "
            f"{version}: it was damaged, or the stages run different versions of sparse_comm"
        )
    checked = checksum if flags & _CHECKED else None
    return Header(tensors, number, nbytes, bool(flags & _ANNOUNCED), checked)


def decode(
    message: Tensor,
    kept: Sequence[Kept | None] | None = None,
    *,
    codec: Codec | None = None,
    number: int | None = None,
    checksum: bool = False,
) -> tuple[list[Tensor | None], list[Kept | None]]:
    """Read the tensors of a message.

    Args:
        message: of ``encode``: uint8, 1-D. Tensors that were sent dense share its memory.
        kept: of gradients: what ``encode`` gave of the tensors whose gradients they are.
        codec: the writer's, if it is none of this package.
        number: that the message must have.
        checksum: whether it must have one.

    Returns:
        The tensors, and what ``encode`` of their gradients needs.

    Raises:
        MessageError: the message was truncated or damaged, as far as lengths, counts and, if there
            is one, the checksum show; or it has another number.

    Source: ours.
    """
    header = read_header(message)
    if header.nbytes != message.numel() or header.announces:
        raise MessageError(
            f"the message has {message.numel()} bytes, its header says {header.nbytes}"
        )
    if checksum and header.checksum is None:
        raise MessageError("the message has no checksum, which it should have")
    if header.checksum is not None and (found := _checksum(message)) != header.checksum:
        raise MessageError(f"the message's checksum is {found:08x}, it says {header.checksum:08x}")
    if message[-_TAIL.size :].numpy().tobytes() != _TAIL.pack(header.number, _MAGIC):
        raise MessageError(f"the message of {message.numel()} bytes lacks its end")
    if number is not None and header.number != number:
        raise MessageError(f"expected the message of micro-batch {number}, got {header.number}'s")
    if kept is not None and len(kept) != header.tensors:
        raise MessageError(f"expected {len(kept)} gradients, the message has {header.tensors}")
    tensors: list[Tensor | None] = []
    theirs: list[Kept | None] = []
    entries = _entries(message, header.tensors)
    for index, (code, dtype, shape, start, nbytes) in enumerate(entries):
        if dtype is None:
            tensors.append(None)
            theirs.append(None)
            continue
        reader = codec if code == _OWN else _CODECS[code] if code < len(_CODECS) else None
        if reader is None:
            raise MessageError(f"tensor {index} was written by codec {code}, which is not known")
        data = message[start : start + nbytes]
        tensor, keeps = reader.read(data, dtype, shape, kept[index] if kept else None)
        tensors.append(tensor)
        theirs.append(keeps)
    return tensors, theirs


def _entries(
    message: Tensor, count: int
) -> list[tuple[int, torch.dtype | None, tuple[int, ...], int, int]]:
    """Codec, dtype (None if absent), shape, and where it starts and how long it is, by tensor."""
    raw = message.numpy().data
    read, at = [], _HEADER.size
    try:
        for _ in range(count):
            code, dtype, ndim, _, nbytes = _ENTRY.unpack_from(raw, at)
            at += _ENTRY.size
            shape = struct.unpack_from(f"<{ndim}q", raw, at)
            at += 8 * ndim
            read.append((code, None if code == _ABSENT else _DTYPES[dtype], shape, nbytes))
    except (struct.error, IndexError) as error:
        raise MessageError(f"the entries of a message of {count} tensors are damaged") from error
    found = []
    for code, of_dtype, shape, nbytes in read:
        if of_dtype is not None:
            at = _aligned(at)
        found.append((code, of_dtype, shape, at, nbytes))
        at += nbytes
        if min(shape, default=0) < 0 or math.prod(shape) >= 1 << 56 or at > len(raw) - _TAIL.size:
            raise MessageError(
                f"a tensor of shape {shape} and {nbytes} bytes is not in a message of "
                f"{message.numel()} bytes"
            )
    if at + _TAIL.size != message.numel():
        raise MessageError(f"the tensors end at byte {at} of {message.numel()}")
    return found


def _describe(tensor: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Code of the dtype, and the shape."""
    if tensor is None:
        return 0, ()
    if tensor.dtype not in _DTYPE_CODES or tensor.device.type != "cpu":
        raise TypeError(
            f"a message holds CPU tensors of {', '.join(str(d) for d in _DTYPES)}; got "
            f"{tensor.dtype} on {tensor.device}"
        )
    return _DTYPE_CODES[tensor.dtype], tuple(tensor.shape)


def _aligned(at: int) -> int:
    return -(-at // _ALIGNMENT) * _ALIGNMENT


def _put(message: Tensor, data: bytes) -> None:
    message[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _checksum(message: Tensor) -> int:
    """As in the writer: with zeros in the checksum's place."""
    raw = message.numpy().data
    fields = list(_HEADER.unpack(raw[: _HEADER.size].tobytes()))
    fields[5] = 0
    return zlib.crc32(raw[_HEADER.size :], zlib.crc32(_HEADER.pack(*fields)))
