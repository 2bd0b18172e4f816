"""Checkpoints on disk: masks travel with them; dense ones become compact, and the other way.

A checkpoint is a folder ``<folder>/<tag>``; the masks lie in ``masks.safetensors`` there, by the
names that parameters have in the whole model. DeepSpeed's own format flattens the parameters of a
rank into one tensor. Its *universal* format, which its tool ``ds_to_universal`` makes, has a folder
a parameter: there a dense tensor is packed, or values are expanded, file by file.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import PARAM
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sparse_comm import save_masks
from sparse_comm.kernels import expand, pack
from sparse_comm.mask_file import MASKS, load_patterns
from sparse_comm.pattern import SparsityPattern

__all__ = [
    "dense_state_dict_of",
    "expand_checkpoint",
    "folder_of",
    "pack_checkpoint",
    "pack_state",
]

ADAM_STATES = ("fp32", "exp_avg", "exp_avg_sq", "step")  # what DeepSpeed's universal format holds
Patterns = dict[str, SparsityPattern]


def pack_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    masks: str | os.PathLike[str] | None = None,
    tag: str | None = None,
) -> Path:
    """Write a compact universal checkpoint, with the optimizer's state.

    A compact engine loads it with ``"checkpoint": {"load_universal": true}``, on any number of
    ranks. (On the same number, ``engine.load_checkpoint`` of a compact engine takes the source
    itself, compact or dense.)

    Args:
        source: folder given to ``save_checkpoint``, by a compact or a dense engine, or to
            ``expand_checkpoint`` as its target; ZeRO 1 to 3 and an optimizer like Adam.
        target: folder for the new checkpoint.
        masks: file of ``sparse_comm.save_masks``, for a dense source; a compact one has its own.
        tag: of the checkpoint; the latest if not given.

    Returns:
        The folder of the new checkpoint, ``target/tag``.

    Raises:
        FileNotFoundError: no such checkpoint, or file of masks.
        FileExistsError: the target has one of that tag.
        ValueError: it is of ZeRO 0 or of experts, does not fit the masks, or masks are missing or
            too many.

    Source: ours, upon DeepSpeed's universal checkpoints.
    """
    folder = folder_of(source, tag)
    is_compact = (folder / MASKS).exists()
    if is_compact != (masks is None):
        raise ValueError(
            f"{str(folder)!r} is compact and has its own {MASKS}: give no masks, or pack what "
            "expand_checkpoint makes of it"
            if is_compact
            else f"{str(folder)!r} is a dense checkpoint: give the masks, a file of save_masks"
        )
    patterns = load_patterns(folder / MASKS if masks is None else masks)
    translate = None if is_compact else pack_state
    written = _translated(folder, Path(target) / folder.name, patterns, translate)
    save_masks(patterns, written / MASKS)
    return written


def expand_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], tag: str | None = None
) -> Path:
    """Write a dense universal checkpoint from a compact one, with its optimizer state.

    A dense engine loads it with ``"checkpoint": {"load_universal": true}``, on any number of ranks.

    Args:
        source: folder given to ``save_checkpoint``; ZeRO 1 to 3 and an optimizer like Adam.
        target: folder for the new checkpoint.
        tag: of the checkpoint; the latest if not given.

    Returns:
        The folder of the new checkpoint, ``target/tag``.

    Raises:
        FileNotFoundError: no such checkpoint, or it is not compact.
        FileExistsError: the target has one of that tag.
        ValueError: it is of ZeRO 0 or of experts.

    Source: ours, upon DeepSpeed's universal checkpoints.
    """
    folder = folder_of(source, tag)
    return _translated(folder, Path(target) / folder.name, _masks_in(folder), expand_state)


def dense_state_dict_of(
    source: str | os.PathLike[str], tag: str | None = None
) -> dict[str, Tensor]:
    """The plain dense state dict of a compact checkpoint, in fp32: zero where pruned.

    Args:
        source: folder given to ``save_checkpoint``, of any ZeRO stage; no pipelines or experts.
        tag: of the checkpoint; the latest if not given.

    Returns:
        What the plain model's ``load_state_dict`` takes, on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint, or it is not compact.
        ValueError: it is of a pipeline or of experts.

    Source: ours.
    """
    folder = folder_of(source, tag)
    patterns = _masks_in(folder)
    if any(folder.glob("layer_*")):
        raise ValueError(
            f"{str(folder)!r} is a checkpoint of a pipeline or of experts, whose weights lie in "
            "files of their own: load it into a compact engine, and take engine.save_16bit_model"
        )
    found: dict[str, Tensor] = {}
    states = folder / "mp_rank_00_model_states.pt"
    if states.exists():  # not in ZeRO 3
        found.update(torch.load(states, map_location="cpu", weights_only=False)["module"])
    if any(folder.glob("*_optim_states.pt")):  # masters in fp32, of what is trained
        with _quiet():
            found.update(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), folder.name))
    # A tied parameter has one mask, under one of its names.
    tied = {found[name].data_ptr(): pattern for name, pattern in patterns.items() if name in found}
    dense = {}
    for name, tensor in found.items():
        if name.endswith("_extra_state"):
            continue
        whole = tensor.float() if tensor.is_floating_point() else tensor
        pattern = patterns.get(name) or tied.get(tensor.data_ptr())
        if pattern is not None and tuple(whole.shape) == (pattern.nnz,):
            whole = expand_state(whole, pattern)
        dense[name] = whole
    return dense


def folder_of(source: str | os.PathLike[str], tag: str | None, universal: bool = False) -> Path:
    """The folder of a checkpoint; ``universal``: as an engine that loads such ones chooses.

    Raises:
        FileNotFoundError: there is none.
    """
    if tag is None:
        names = ("latest_universal",) if universal else ("latest", "latest_universal")
        for latest in names:
            with contextlib.suppress(FileNotFoundError):
                tag = (Path(source) / latest).read_text().strip()
                break
        else:
            raise FileNotFoundError(
                f"{str(source)!r} has no file {names[0]!r} that names a checkpoint: give its tag"
            )
    folder = Path(source) / str(tag)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {str(folder)!r}")
    return folder


def pack_state(dense: Tensor, pattern: SparsityPattern) -> Tensor:
    """Of a whole parameter's weights or moments, flat or not."""
    return pack(dense.reshape(pattern.shape).contiguous(), pattern)


def expand_state(values: Tensor, pattern: SparsityPattern) -> Tensor:
    """The dense tensor of values."""
    return expand(values, pattern)


def _masks_in(folder: Path) -> Patterns:
    try:
        return load_patterns(folder / MASKS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{str(folder)!r} is not a compact checkpoint: it has no {MASKS}"
        ) from error


def _translated(
    folder: Path,
    target: Path,
    patterns: Patterns,
    translate: Callable[[Tensor, SparsityPattern], Tensor] | None,
) -> Path:
    """A universal checkpoint whose masked parameters are translated. Whole, or not there.

    ``translate``: None for values that stay values.
    """
    if not any(folder.glob("*_optim_states.pt")) and not (folder / "zero").is_dir():
        raise ValueError(
            f"{str(folder)!r} is a checkpoint of ZeRO 0, which DeepSpeed cannot make universal; "
            "take its weights alone: dense_state_dict_of, or load_checkpoint of a compact engine"
        )
    if any(folder.glob("layer_*_expert_*")):
        raise ValueError(
            f"{str(folder)!r} is a checkpoint of experts, whose optimizer's state is kept by ranks "
            "and cannot be translated: load it into a compact engine on as many ranks"
        )
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists: remove it, or choose another target")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    draft = made / target.name  # DeepSpeed's tool writes beside it, too
    try:
        if (folder / "zero").is_dir():
            shutil.copytree(folder, draft)
            (draft / MASKS).unlink(missing_ok=True)
        else:
            try:
                with _quiet():
                    ds_to_universal(_arguments(folder, draft))
            except KeyError as error:
                raise ValueError(
                    f"{str(folder)!r} has no {error} of its optimizer: only the state of Adam and "
                    "AdamW can be translated; take the weights alone (dense_state_dict_of, or "
                    "load_optimizer_states=False)"
                ) from error
        frozen = _frozen(folder)
        for name, pattern in patterns.items():
            if (draft / "zero" / name).is_dir():
                _translate(draft / "zero" / name, pattern, translate)
            elif name not in frozen:  # which ZeRO 3 leaves out
                raise ValueError(
                    f"the masks have {name!r}, the checkpoint has not: they are of another model"
                )
        for extra in (draft / "zero").glob("*_extra_state"):  # digests, which are no weights
            shutil.rmtree(extra)
        draft.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    (target.parent / "latest_universal").write_text(target.name)
    return target


def _translate(
    folder: Path,
    pattern: SparsityPattern,
    translate: Callable[[Tensor, SparsityPattern], Tensor] | None,
) -> None:
    for file in folder.glob("*.pt"):
        if file.stem not in ADAM_STATES:
            raise ValueError(
                f"the checkpoint keeps {file.stem!r} of {folder.name!r}: only the state of Adam "
                "and AdamW can be translated; take the weights alone (dense_state_dict_of, or "
                "load_optimizer_states=False)"
            )
        held: Any = torch.load(file, map_location="cpu", weights_only=False)
        state = held.get(PARAM) if isinstance(held, dict) else held  # bare in ZeRO 3
        if not isinstance(state, Tensor) or state.dim() == 0:  # the number of steps
            continue
        expected = pattern.numel if translate is pack_state else pattern.nnz
        if state.numel() != expected:
            raise ValueError(
                f"{folder.name!r} has {state.numel()} entries in the checkpoint, by its mask "
                f"{expected}: the masks are of another model, or the checkpoint is "
                f"{'compact' if translate is pack_state else 'dense'}"
            )
        if translate is None:
            continue
        state = translate(state, pattern)
        torch.save({**held, PARAM: state} if isinstance(held, dict) else state, file)


def _frozen(folder: Path) -> set[str]:
    """Names of parameters that no optimizer holds."""
    names: set[str] = set()
    for file in folder.glob("*_model_states.pt"):
        state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        names.update(state.get("frozen_param_shapes") or ())
    return names


def _arguments(source: Path, target: Path) -> Namespace:
    """Of DeepSpeed's tool, which is a program."""
    return Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )


@contextlib.contextmanager
def _quiet() -> Any:
    """DeepSpeed's tools print what they do, line by line and by bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
