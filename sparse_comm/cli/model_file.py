"""A model on disk as safetensors, in one file or in shards, read one tensor at a time."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

__all__ = ["ModelFile", "choose"]

_INDEX = ".safetensors.index.json"
_FLOATING = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class ModelFile:
    """The tensors of a model on disk, of which none is in memory before ``load`` is called.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a folder that holds one.

    Attributes:
        files: the files with tensors, absolute and links resolved.
        floating: shape and dtype of each fp64, fp32, fp16 and bf16 tensor by name (meta tensors).
        other: safetensors' dtype of each other tensor by name; fp8 ones are among them, for their
            scales are not in their entries.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: not safetensors, cut short, or shards that do not fit their index.

    Source: ours.
    """

    def __init__(self, path: Path) -> None:
        index = _find(path)
        self._file_of = _shards(index) if index.name.endswith(_INDEX) else {}
        self.files = sorted({f.resolve() for f in self._file_of.values()} or {index.resolve()})
        self.floating: dict[str, Tensor] = {}
        self.other: dict[str, str] = {}
        for file in sorted(set(self._file_of.values()) or {index}):
            self._add(file, {name for name, shard in self._file_of.items() if shard == file})

    def _add(self, file: Path, wanted: set[str]) -> None:
        """Note what ``file`` holds; of a shard, only what the index wants of it."""
        with _open(file) as content:
            names = set(content.keys())
            if missing := min(wanted - names, default=None):
                raise ValueError(f"{file} holds no tensor {missing!r}, which its index looks for")
            for name in sorted(wanted or names):
                self._file_of[name] = file
                entry = content.get_slice(name)
                dtype = _FLOATING.get(entry.get_dtype())
                if dtype is None:
                    self.other[name] = entry.get_dtype()
                else:
                    shape = entry.get_shape()
                    self.floating[name] = torch.empty(shape, dtype=dtype, device="meta")

    def load(self, name: str) -> Tensor:
        """The tensor, mapped from its file and not copied; it must not be written to."""
        # Opened anew each time: what a mapping has read counts as this process's memory until it
        # is closed, so a single one would grow to the size of the model.
        with _open(self._file_of[name]) as content:
            try:
                tensor: Tensor = content.get_tensor(name)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{self._file_of[name]}: {name!r}: {error}") from None
            return tensor


def choose(
    model: ModelFile, names: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Tensor]:
    """The floating-point tensors that take part, as shapes by name.

    Args:
        model: where they are.
        names: globs; a full name may be of one dimension, too. All of two or more dimensions if
            not given.
        exclude: globs of those to leave out.

    Raises:
        ValueError: a glob fits no tensor, or nothing is left.
    """
    chosen = {name for name, tensor in model.floating.items() if tensor.ndim >= 2}
    if names is not None:
        chosen = {name for glob in names for name in _named(glob, model)}
    for glob in exclude or ():
        chosen = chosen - set(_fitting(glob, model))
    if not chosen:
        raise ValueError(_why_nothing(model, bool(exclude)))
    return {name: model.floating[name] for name in sorted(chosen)}


def _named(glob: str, model: ModelFile) -> list[str]:
    fitting = _fitting(glob, model)
    if glob in fitting:
        return [glob]
    if matrices := [name for name in fitting if model.floating[name].ndim >= 2]:
        return matrices
    raise ValueError(
        f"{glob!r} fits only tensors of one dimension, which stay dense unless their full name is "
        f"given, such as {fitting[0]!r}"
    )


def _fitting(glob: str, model: ModelFile) -> list[str]:
    if glob in model.floating:  # a name, even if it has brackets
        return [glob]
    if glob in model.other:
        raise ValueError(f"{glob!r} has dtype {model.other[glob]}; only F64, F32, F16 and BF16 can")
    fitting = fnmatch.filter(model.floating, glob)
    if not fitting:
        close = difflib.get_close_matches(glob, model.floating, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no floating-point tensor of the model fits {glob!r}{hint}")
    return fitting


def _why_nothing(model: ModelFile, narrowed: bool) -> str:
    if narrowed:
        return (
            "no tensor to prune is left: --exclude leaves out all of those of floating point with "
            "two or more dimensions"
        )
    if not model.floating:
        kinds = ", ".join(sorted(set(model.other.values()))) or "none at all"
        return f"no tensor to prune: F64, F32, F16 and BF16 can be, the model has {kinds}"
    return (
        "no tensor to prune: none of floating point has two or more dimensions; if the model was "
        "saved compact, save sparse_comm.dense_state_dict(model) instead"
    )


def _find(path: Path) -> Path:
    """The file to begin with: tensors, or the index of shards."""
    if not path.is_dir():
        return path
    indices, files = sorted(path.glob(f"*{_INDEX}")), sorted(path.glob("*.safetensors"))
    for found in (indices, files):
        usual = [f for f in found if f.name in (f"model{_INDEX}", "model.safetensors")]
        if one := usual or found:
            if len(one) == 1:
                return one[0]
            raise ValueError(
                f"{path} holds {len(found)} models ({found[0].name}, {found[1].name}, …): name one"
                + ("" if found is indices else ", or get the index of the shards, too")
            )
    raise ValueError(f"the folder {path} holds no .safetensors file")


def _shards(index: Path) -> dict[str, Path]:
    """The shard of each tensor."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: index.parent / shard for name, shard in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is no index of shards as Hugging Face writes: a JSON object with weight_map"
        ) from None
    for shard in sorted(set(shards.values())):
        if not shard.is_file():
            raise ValueError(f"shard {shard} is missing, which {index.name} names: get it, too")
    if not shards:
        raise ValueError(f"{index} names no tensors")
    return shards


def _open(file: Path) -> safetensors.safe_open:
    with file.open("rb") as raw:  # raises for a missing file, with the path
        start = raw.read(40)
    if start[8:9] not in (b"{", b"") or not start:
        raise ValueError(f"{file} is not a safetensors file{_hint(start)}")
    try:
        return safetensors.safe_open(file, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is cut short or damaged ({error}): get it again") from None


def _hint(start: bytes) -> str:
    if not start:
        return ": it is empty"
    if start.startswith(b"version https://git-lfs"):
        return " but a pointer of Git LFS: run git lfs pull"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return (
            " but a pickle, as torch.save writes: load it, then "
            "safetensors.torch.save_file(state_dict, 'model.safetensors')"
        )
    return ""
