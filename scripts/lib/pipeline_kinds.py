"""The sides of ``compare_comm.py --pipeline``: how messages are sent, and what users would pick."""

import math
import zlib
from collections.abc import Callable
from typing import Any

import lz4.frame
import torch
from torch import Tensor

from sparse_comm.pipeline import Codec, Dense, Kept

DENSE, CHANNELS, ZEROS, AUTO = "dense", "channels", "zeros", "auto"
SAME_WAY = "dense, in our messages"
BF16, LZ4, ZLIB, NOTHING = "dense, rounded to bf16", "lz4", "zlib", "no sends"
OURS = (CHANNELS, ZEROS, AUTO)
EXACT = (DENSE, SAME_WAY, *OURS, LZ4, ZLIB)
KINDS = (DENSE, SAME_WAY, BF16, LZ4, ZLIB, *OURS, NOTHING)


class Compressed:
    """Of the shelf: every byte of a tensor through a compressor."""

    def __init__(
        self, name: str, compress: Callable[[Any], bytes], expand: Callable[[Any], bytes]
    ) -> None:
        self.name, self._compress, self._expand = name, compress, expand

    def bound(self, tensor: Tensor) -> int:
        return tensor.nbytes + tensor.nbytes // 8 + 1024

    def write(self, room: Tensor, tensor: Tensor, kept: Kept | None) -> tuple[int, None] | None:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        packed = self._compress(raw.data)
        if len(packed) >= tensor.nbytes:
            return None
        room[: len(packed)].copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        return len(packed), None

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, None]:
        raw = bytearray(self._expand(data.numpy().data))
        return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape), None


class Rounded:
    """fp32 tensors travel in bf16: half the bytes, and other results."""

    name = BF16

    def bound(self, tensor: Tensor) -> int:
        return tensor.nbytes

    def write(self, room: Tensor, tensor: Tensor, kept: Kept | None) -> tuple[int, None] | None:
        if tensor.dtype != torch.float32 or tensor.numel() == 0:
            return None
        nbytes = tensor.nbytes // 2
        room[:nbytes].view(torch.bfloat16).view(tensor.shape).copy_(tensor.detach())
        return nbytes, None

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, None]:
        return data.view(torch.bfloat16).view(shape).to(dtype), None


class Nothing:
    """Sends nothing, and reads noise: what a step takes if sends cost nothing. No training."""

    name = NOTHING

    def bound(self, tensor: Tensor) -> int:
        return 8

    def write(self, room: Tensor, tensor: Tensor, kept: Kept | None) -> tuple[int, None] | None:
        return (0, None) if tensor.is_floating_point() else None

    def read(
        self, data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], kept: Kept | None
    ) -> tuple[Tensor, None]:
        return _noise(math.prod(shape), dtype).view(shape), None


_kept_noise: dict[tuple[int, torch.dtype], Tensor] = {}


def _noise(count: int, dtype: torch.dtype) -> Tensor:
    """Half of it zeros, as behind a ReLU; the same every time, as making it takes time."""
    if (count, dtype) not in _kept_noise:
        _kept_noise[count, dtype] = torch.relu(torch.randn(count) * 1e-2).to(dtype)
    return _kept_noise[count, dtype].clone()


def codec_of(kind: str) -> str | Codec:
    """What ``pack_sends`` is given."""
    if kind == LZ4:
        return Compressed(LZ4, lz4.frame.compress, lz4.frame.decompress)
    if kind == ZLIB:
        return Compressed(ZLIB, lambda raw: zlib.compress(raw, 1), zlib.decompress)
    peers: dict[str, Codec] = {SAME_WAY: Dense(), BF16: Rounded(), NOTHING: Nothing()}
    return peers.get(kind, kind)
