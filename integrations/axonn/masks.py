"""Masks of the whole model, and what of them belongs to this rank's stage and shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sparse_comm.compact.validate import unknown_name
from sparse_comm.mask_sync import compare_digests, gather, on_all_ranks
from sparse_comm.masks import patterns_from_masks
from sparse_comm.pattern import SparsityPattern

from .layers import cut, full_shape, layers_of
from .modules import config

__all__ = ["Names", "agreed_patterns", "whole_names"]

Names = Callable[[str], str] | Mapping[str, str] | None


def whole_names(model: nn.Module, names: Names) -> dict[str, str]:
    """Name in the whole model of each parameter and buffer, by its name in this stage.

    Args:
        model: the stage.
        names: what gives it: a function, a mapping of all, or None if the names are the same.

    Raises:
        ValueError: a mapping that lacks a name, or two that become one.
    """
    own = dict.fromkeys(
        name
        for named in (model.named_parameters, model.named_buffers)
        for name, _ in named(remove_duplicate=False)
    )
    if names is None:
        return {name: name for name in own}
    if isinstance(names, Mapping):
        if missing := [name for name in own if name not in names]:
            raise ValueError(
                f"names has no entry for {missing[0]!r} of the stage: give the name in the whole "
                "model of each parameter and buffer, or a function of the name in the stage"
            )
        given = {name: names[name] for name in own}
    else:
        given = {name: names(name) for name in own}
    taken: dict[str, str] = {}
    for local, name in given.items():
        if taken.setdefault(name, local) != local:
            raise ValueError(f"names gives {name!r} to both {taken[name]!r} and {local!r}")
    return given


def agreed_patterns(
    model: nn.Module, masks: Mapping[str, Any] | None, there: Mapping[str, str]
) -> dict[str, SparsityPattern]:
    """The pattern of each masked parameter, by its name in this stage. A collective of all ranks.

    Args:
        model: the stage.
        masks: by the names of the whole model, of the parameters' full shapes; or of the shape of
            this rank's shard.
        there: of ``whole_names``.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks: masks for parameters that no stage has,
            of another shape, or that differ between ranks that hold the same parameter.
    """
    given = on_all_ranks(lambda: _named(masks))
    known = [name for held in gather(list(there.values())) for name in held]
    hint = ""
    if config.G_inter > 1 and all(local == name for local, name in there.items()):
        hint = (
            "; masks go by the names of the whole model: if stages call their parameters "
            "otherwise, give the engine names=…"
        )
    on_all_ranks(lambda: _check_known(given, known, hint))
    patterns = on_all_ranks(lambda: _of_this_rank(model, given, there))
    parallel = {path for path, _ in layers_of(model)}
    digests = {}
    for local, name in there.items():
        digest = patterns[local].digest() if local in patterns else None
        is_parallel = local.rpartition(".")[0] in parallel
        digests[name + _where(is_parallel)] = digest
        if is_parallel:  # all parts have a mask, or none
            digests[name + _where(False)] = None if digest is None else "masked"
    compare_digests(digests, partial=True)
    return patterns


def _named(masks: Any) -> dict[str, Tensor | SparsityPattern]:
    if not isinstance(masks, Mapping):
        raise TypeError(
            "sparse=True needs masks, bool tensors by the names of the whole model "
            f"(sparse_comm.load_masks, masks_from_zeros, …), got {type(masks).__name__}"
        )
    patterns_from_masks({k: v for k, v in masks.items() if not isinstance(v, SparsityPattern)})
    return dict(masks)


def _check_known(names: Iterable[str], known: list[str], hint: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(unknown_name(name, known, "parameter of any stage") + hint)


def _where(parallel: bool) -> str:
    """Which part of the model a name is of: stages may use the same names."""
    parts = []
    if config.G_inter > 1:
        parts.append(f"stage {config.inter_layer_parallel_rank}")
    if parallel:
        parts.append(
            f"row {config.intra_layer_row_parallel_rank}, "
            f"column {config.intra_layer_column_parallel_rank}, "
            f"depth {config.intra_layer_depth_parallel_rank}"
        )
    return f" ({', '.join(parts)})" if parts else ""


def _of_this_rank(
    model: nn.Module, given: Mapping[str, Tensor | SparsityPattern], there: Mapping[str, str]
) -> dict[str, SparsityPattern]:
    layers = dict(layers_of(model))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    patterns: dict[str, SparsityPattern] = {}
    for local, parameter in model.named_parameters(remove_duplicate=False):
        mask = given.get(there[local])
        if mask is None:
            continue
        path, _, name = local.rpartition(".")
        shape = parameter.shape
        if path in layers and mask.shape != shape:
            shape = full_shape(layers[path], name)
        if mask.shape != shape:
            raise ValueError(
                f"mask for {there[local]!r} has shape {tuple(mask.shape)}, the parameter "
                f"{tuple(shape)}"
            )
        if shape != parameter.shape:
            if isinstance(mask, SparsityPattern):
                mask = mask.to_mask()
            mask = cut(layers[path], name, mask)
        pattern = mask if isinstance(mask, SparsityPattern) else SparsityPattern(mask)
        if patterns.setdefault(first[id(parameter)], pattern) != pattern:
            raise ValueError(
                f"parameter {local!r} is tied to {first[id(parameter)]!r}, but their masks differ: "
                "give one mask, or the same for both"
            )
    return patterns
