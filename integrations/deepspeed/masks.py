"""Where the masks of a model come from, and that all ranks have the same."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import sparse_comm
from sparse_comm.compact.validate import pattern_for, unknown_name
from sparse_comm.mask_file import load_patterns
from sparse_comm.mask_sync import compare_digests, gather, on_all_ranks
from sparse_comm.masks import masks_from_zeros_by
from sparse_comm.pattern import SparsityPattern

from .block import NOT_A_PATH, Block
from .names import global_names
from .partitioned import PartitionedAccess, is_partitioned, whole

__all__ = ["agreed_patterns"]

Patterns = dict[str, SparsityPattern]


def agreed_patterns(block: Block, model: nn.Module, mpu: Any = None) -> Patterns:
    """The pattern of each masked parameter, by its name on this rank. A collective.

    Each rank takes what belongs to the part of the model that it holds (its pipeline stage, its
    experts). Ranks that hold the same parameter must have the same mask for it.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, or not one of masks; a mask that
            fits no parameter, or not its shape; ranks that differ. All ranks raise, those that
            have no fault of their own a RuntimeError or the same.
    """
    if block.masks in NOT_A_PATH:
        advice = "prune the same entries on each, or save the masks and name the file in 'masks'"
        found = _SOURCES[block.masks](model)  # which may give parameters their names back
        there = on_all_ranks(lambda: global_names(model, mpu))
        patterns = on_all_ranks(lambda: _as_patterns(found, there))
    else:
        advice = f"copy the file {block.masks!r} of one machine to the others"
        there = on_all_ranks(lambda: global_names(model, mpu))
        given = on_all_ranks(lambda: _from_file(block.masks))
        try:
            _refuse_unknown(given, there, model)
            patterns = on_all_ranks(lambda: _fitting(given, there, model))
        except ValueError as error:
            raise ValueError(
                f"the masks of {block.masks!r} do not fit the model, or are another model's: "
                f"{error}"
            ) from error
    digests = {
        name: patterns[local].digest() if local in patterns else None
        for local, name in there.items()
    }
    compare_digests(digests, partial=True, advice=advice)
    if not any(gather(bool(patterns))):
        raise ValueError(
            f"the block 'sparse_comm' is enabled, but its masks ({block.masks!r}) mask nothing: "
            "prune the model, or switch the block off"
        )
    return patterns


def _from_file(path: str) -> Patterns:
    try:
        return load_patterns(path)
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path, NOT_A_PATH, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"'masks' of the block 'sparse_comm' names the file {path!r}, which does not exist "
            f"({os.path.abspath(path)!r}){hint}; sparse_comm.save_masks(masks, path) writes one, "
            "and every machine needs it"
        ) from error


def _from_zeros(model: nn.Module) -> dict[str, Tensor]:
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return masks_from_zeros_by(model, whole)  # a collective, which fails on all alike
    return on_all_ranks(lambda: masks_from_zeros_by(model, whole))


def _from_torch_prune(model: nn.Module) -> dict[str, Tensor]:
    def found() -> dict[str, Tensor]:
        if any(is_partitioned(p) for p in model.parameters()):
            raise ValueError(
                "'masks': 'from_torch_prune' needs whole parameters, and deepspeed.zero.Init has "
                "partitioned them: save the masks (sparse_comm.save_masks) and name the file"
            )
        return sparse_comm.masks_from_torch_prune(model)

    return on_all_ranks(found)


def _from_deepspeed_compression(model: nn.Module) -> dict[str, Tensor]:
    """The masks of layers of ``deepspeed.compression`` (DeepSpeed up to 0.18), made permanent."""

    def found() -> dict[str, Tensor]:
        masks = {}
        for path, layer in model.named_modules():
            module: Any = layer
            if getattr(module, "sparse_pruning_method", None) is None:
                continue
            with torch.no_grad():
                mask = module.get_mask(pruning_type="sparse").reshape(module.weight.shape)
            masks[f"{path}.weight" if path else "weight"] = mask != 0
            module.fix_sparse_pruning_helper()
        if not masks:
            raise ValueError(
                "'masks': 'from_deepspeed_compression', but no layer of the model is one of "
                "deepspeed.compression with sparse pruning (this DeepSpeed has removed that "
                "library). A model that redundancy_clean has gone over, or that was pruned and "
                "saved by an older DeepSpeed, has its masks in its zeros: use 'from_zeros'"
            )
        return masks

    return on_all_ranks(found)


_SOURCES: dict[str, Callable[[nn.Module], dict[str, Tensor]]] = {
    "from_zeros": _from_zeros,
    "from_torch_prune": _from_torch_prune,
    "from_deepspeed_compression": _from_deepspeed_compression,
}


def _as_patterns(masks: Mapping[str, Tensor], there: Mapping[str, str]) -> Patterns:
    for name in masks:
        if name not in there:
            raise ValueError(unknown_name(name, list(there), "parameter"))
    return {name: SparsityPattern(mask) for name, mask in masks.items()}


def _fitting(given: Patterns, there: Mapping[str, str], model: nn.Module) -> Patterns:
    """Those of this rank's parameters, by their names here; tied ones may go by any name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    shape = PartitionedAccess().shape
    patterns: Patterns = {}
    for local, parameter in parameters.items():
        pattern = given.get(there.get(local, local))
        if pattern is None:
            continue
        pattern = pattern_for(local, pattern, shape(parameter))
        name = first[id(parameter)]
        if patterns.setdefault(name, pattern) != pattern:
            raise ValueError(
                f"parameter {local!r} is tied to {name!r}, but their masks differ: give one mask, "
                "or the same for both"
            )
    return patterns


def _refuse_unknown(names: Iterable[str], there: Mapping[str, str], model: nn.Module) -> None:
    """Refuse masks for parameters that no rank has. A collective."""
    here = {there.get(n, n) for n, _ in model.named_parameters(remove_duplicate=False)}
    unknown = [name for name in names if name not in here]
    gathered = gather((unknown, list(there.values())))
    known = {name: None for _, held in gathered for name in held}  # a set that keeps its order
    for name in (name for missing, _ in gathered for name in missing):
        if all(name in missing for missing, _ in gathered):
            raise ValueError(unknown_name(name, list(known), "parameter"))
