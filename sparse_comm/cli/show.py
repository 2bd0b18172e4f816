"""``sparse-comm masks show``: the masks of a file, read one at a time."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors

from sparse_comm import mask_file
from sparse_comm.cli.screen import (
    Column,
    bytes_text,
    console,
    natural_order,
    print_table,
    readable,
)
from sparse_comm.pattern import SparsityPattern

__all__ = ["run"]

_COLUMNS = [
    Column("mask"),
    Column("shape"),
    Column("nnz", right=True, expendable=1),
    Column("density", right=True),
    Column("sparsity", right=True, expendable=3),
    Column("N:M"),
    Column("digest", expendable=4),
    Column("size", right=True, expendable=2),
]
_DIGITS = 8  # of a digest's 32 that the table shows


def run(options: argparse.Namespace) -> int:
    """Print the masks of a file; returns the exit status."""
    masks = [_facts(name, pattern) for name, pattern in _read(options.file)]
    masks.sort(key=lambda mask: natural_order(mask["name"]))
    total = {key: sum(mask[key] for mask in masks) for key in ("numel", "nnz", "bytes")}
    total |= _shares(total["nnz"], total["numel"])
    size = os.path.getsize(options.file)
    if options.json:
        content = {"file": options.file, "file_bytes": size, "masks": masks, "total": total}
        print(json.dumps(content, indent=2))
        return 0
    out = console()
    rows = [_cells(mask) for mask in masks]
    count = f"{len(masks)} mask{'' if len(masks) == 1 else 's'}"
    ends = _cells({"name": count, "shape": [], "n_m": None, "digest": "", **total})
    print_table(out, _COLUMNS, rows, ends)
    out.print(f"{options.file}: {bytes_text(size)}; size is that in memory", soft_wrap=True)
    return 0


def _read(path: str) -> Iterator[tuple[str, SparsityPattern]]:
    """The masks of ``load_masks``, with its checks, as bits and one at a time."""
    mask_file._refuse_other_kinds(path)
    try:
        file = safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        mask_file._damaged(path, str(error), error)
    with file:
        metadata = file.metadata() or {}
        if mask_file._KEY not in metadata:
            raise ValueError(
                f"{path} holds tensors, not masks; if it is a pruned model, make masks from it: "
                f"sparse-comm masks make {path} --from-zeros -o masks.safetensors"
            )
        left = set(file.keys())
        for name, (shape, digest) in mask_file._table(path, metadata[mask_file._KEY]).items():
            key = json.dumps(name)
            bits = file.get_tensor(key) if key in left else np.empty(0)
            if bits.dtype != "uint8" or bits.shape != (-(-math.prod(shape) // 64) * 8,):
                mask_file._damaged(path, f"the bits of mask {name!r} do not fit shape {shape}")
            pattern = SparsityPattern._from_bitmap(bits, shape)
            if pattern.digest() != digest:
                mask_file._damaged(path, f"mask {name!r} does not match its digest")
            left.remove(key)
            yield name, pattern
    if left:
        mask_file._damaged(path, f"the tensor {min(left)} belongs to no mask")


def _facts(name: str, pattern: SparsityPattern) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(pattern.shape),
        "numel": pattern.numel,
        "nnz": pattern.nnz,
        **_shares(pattern.nnz, pattern.numel),
        "n_m": "2:4" if _is_two_of_four(pattern) else None,
        "digest": pattern.digest(),
        "bytes": pattern.nbytes,
    }


def _shares(nnz: int, numel: int) -> dict[str, float]:
    density = nnz / numel if numel else 1.0
    return {"density": density, "sparsity": (numel - nnz) / numel if numel else 0.0}


def _is_two_of_four(pattern: SparsityPattern) -> bool:
    """``pattern.is_n_m(2, 4)``, read off the bitmap: half a byte is a group of four."""
    if pattern.numel == 0 or not pattern.shape or pattern.shape[-1] % 4:
        return False
    halves = np.bitwise_count(np.arange(16, dtype=np.uint8)) <= 2
    fits = (halves[:, None] & halves[None, :]).reshape(256)
    return bool(fits[pattern.bitmap.numpy()].all())


def _cells(mask: dict[str, Any]) -> list[str]:
    return [
        readable(mask["name"]),
        "×".join(map(str, mask["shape"])),
        f"{mask['nnz']:,}",
        f"{mask['density']:.4f}",
        f"{mask['sparsity']:.4f}",
        mask["n_m"] or "",
        mask["digest"][:_DIGITS],
        bytes_text(mask["bytes"]),
    ]
