"""Masks in a file: safetensors, one bit an entry, each with a digest; nothing is unpickled.

The file holds one U8 tensor a mask, its name the mask's in JSON notation: ``SparsityPattern``'s
bitmap (least significant bit first, padded to 64-bit words). The metadata has one key,
``sparse_comm.masks``, whose JSON gives the version of the format and each mask's shape and digest.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn

import safetensors
import safetensors.numpy
from torch import Tensor

from sparse_comm.masks import patterns_from_masks
from sparse_comm.pattern import SparsityPattern

__all__ = ["MASKS", "load_masks", "load_patterns", "save_masks"]

MASKS = "masks.safetensors"  # the usual name, which checkpoints have
_KEY = "sparse_comm.masks"
_VERSION = 1


def save_masks(masks: Mapping[str, Tensor | SparsityPattern], path: str | os.PathLike[str]) -> None:
    """Write masks to a file, whole or not at all.

    The bytes go to a hidden file in the same folder, which then takes the name ``path``: a save
    that is cut short leaves the old file as it was (a kill leaves the hidden one behind, too).
    Equal masks give equal bytes. In a job of many ranks, let one save.

    Args:
        masks: bool tensors, or patterns, by name (any string), of any shape, on any device.
        path: file to write or replace; ``masks.safetensors`` is a usual name.

    Raises:
        TypeError: a mask is not a bool tensor; the message names it.
        OSError: the file cannot be written; the message names it.

    Source: ours; the format is safetensors (https://github.com/huggingface/safetensors).
    """
    # Sorted, and a single key of metadata: safetensors writes several in random order.
    patterns = sorted(patterns_from_masks(masks).items())
    table = {name: [list(pattern.shape), pattern.digest()] for name, pattern in patterns}
    content = safetensors.numpy.save(
        {json.dumps(name): pattern.bitmap.numpy() for name, pattern in patterns},
        {_KEY: json.dumps({"version": _VERSION, "masks": table})},
    )
    _replace(os.path.realpath(path), content)


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The masks that ``save_masks`` wrote, each checked against its digest.

    Args:
        path: the file.

    Returns:
        Bool tensors by name, on the CPU, in the order of their names.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: ``path`` is a folder.
        ValueError: not a file of masks, cut short, or damaged; the message names the file and
            what to do.

    Source: ours.
    """
    return {name: pattern.to_mask() for name, pattern in load_patterns(path).items()}


def load_patterns(path: str | os.PathLike[str]) -> dict[str, SparsityPattern]:
    """``load_masks``, but one bit an entry, as the file has them."""
    path = os.fspath(path)
    _refuse_other_kinds(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            bitmaps = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except safetensors.SafetensorError as error:
        _damaged(path, str(error), error)
    if _KEY not in metadata:
        raise ValueError(
            f"{path!r} is a safetensors file, but holds no masks of sparse_comm.save_masks; if it "
            "is a pruned model, load it into the model and call sparse_comm.masks_from_zeros(model)"
        )
    patterns = {}
    for name, (shape, digest) in _table(path, metadata[_KEY]).items():
        bits = bitmaps.pop(json.dumps(name), None)
        if bits is None or bits.dtype != "uint8" or bits.shape != (-(-math.prod(shape) // 64) * 8,):
            _damaged(path, f"the bits of mask {name!r} are missing or do not fit shape {shape}")
        pattern = SparsityPattern._from_bitmap(bits, shape)
        if pattern.digest() != digest:
            _damaged(path, f"mask {name!r} does not match its digest")
        patterns[name] = pattern
    if bitmaps:
        _damaged(path, f"the tensor {min(bitmaps)} belongs to no mask")
    return patterns


def _replace(path: str, content: bytes) -> None:
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        raise OSError(
            error.errno, f"masks not saved, {error.strerror}; an older file is untouched", path
        ) from error
    finally:
        if os.path.lexists(draft):
            os.unlink(draft)
    _sync_folder(folder)


def _sync_folder(folder: str) -> None:
    """Make the new name survive a power failure; some file systems cannot, and say so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refuse_other_kinds(path: str) -> None:
    """Say what a file is that has not even the beginning of a safetensors file."""
    with open(path, "rb") as file:  # raises for a missing file and for a folder, with the path
        start = file.read(9)
    if not start:
        _damaged(path, "the file is empty")
    if start[8:9] not in (b"{", b""):
        raise ValueError(
            f"{path!r} is not a safetensors file, so it holds no masks of sparse_comm.save_masks; "
            "if it should, it is damaged: save the masks again or take a backup"
        )


def _table(path: str, text: str) -> dict[str, tuple[list[int], str]]:
    """Shape and digest of each mask, from the metadata."""
    try:
        content: dict[str, Any] = json.loads(text)
        version, entries = content["version"], content["masks"]
        table = {name: (shape, digest) for name, (shape, digest) in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _damaged(path, f"its table of masks cannot be read ({error!r})", error)
    if version != _VERSION:
        raise ValueError(
            f"{path!r} has version {version!r} of the format of masks, this sparse_comm reads "
            f"version {_VERSION}: read it with a newer sparse_comm, or save the masks again"
        )
    for name, (shape, _) in table.items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            _damaged(path, f"mask {name!r} has shape {shape!r}")
    return table


def _damaged(path: str, what: str, cause: Exception | None = None) -> NoReturn:
    raise ValueError(
        f"{path!r} is cut short or damaged: {what}; save the masks again or take a backup"
    ) from cause
