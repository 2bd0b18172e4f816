"""What can be compact, and the errors for what cannot. Nothing here changes a model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.slot import MODES, is_sharded
from sparse_comm.masks import validate_mask
from sparse_comm.pattern import SparsityPattern

__all__ = [
    "check_model",
    "check_unwrapped",
    "choose",
    "parameter_places",
    "pattern_for",
    "unknown_name",
]

Place = tuple[str, nn.Parameter, nn.Module, str]


def parameter_places(model: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter stands: (name, parameter, module, attribute), tied ones together."""
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                places.setdefault(id(parameter), []).append((name, parameter, module, attribute))
    return places


def check_model(model: Any, weights: Any, compute_dtype: Any) -> None:
    """Refuse arguments of ``compact`` that do not depend on the masks."""
    check_unwrapped(model, "compact")
    if weights not in MODES:
        raise ValueError(f"weights must be one of {MODES}, got {weights!r}")
    if compute_dtype is not None and not (
        isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point
    ):
        raise TypeError(f"compute_dtype must be a floating torch.dtype, got {compute_dtype!r}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a ScriptModule cannot be compact; compact the eager model")
    if next(compact_slots(model), None) is not None:
        raise ValueError(
            "the model is compact already; use sparse_comm.update_masks(model, masks) to change "
            "its masks, or sparse_comm.densify(model) first"
        )


def check_unwrapped(model: Any, what: str) -> None:
    """Refuse what is no module, and wrappers, which would go on with the parameters replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        wrapper = type(model).__name__
        raise ValueError(
            f"call {what} on the model before wrapping it, {wrapper}({what}(model, …)): a wrapper "
            "goes on with the parameters that it was given"
        )


def choose(
    places: dict[int, list[Place]],
    masks: Mapping[str, Tensor | SparsityPattern],
    shape_of: Callable[[nn.Parameter], torch.Size],
) -> dict[int, tuple[str, SparsityPattern]]:
    """The masked parameters, in the model's order, with their pattern; refuses what cannot be."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a dict of name to mask, got {type(masks).__name__}")
    where = {place[0]: key for key, all_places in places.items() for place in all_places}
    found: dict[int, tuple[str, SparsityPattern]] = {}
    for name, mask in masks.items():
        if name not in where:
            raise ValueError(unknown_name(name, list(where), "parameter"))
        key = where[name]
        parameter = places[key][0][1]
        _check_parameter(name, parameter)
        pattern = pattern_for(name, mask, shape_of(parameter))
        if key in found and found[key][1] != pattern:
            raise ValueError(
                f"parameter {name!r} is tied to {found[key][0]!r}, but their masks differ: give "
                "one mask, or the same for both"
            )
        found.setdefault(key, (places[key][0][0], pattern))
        for place_name, _, module, _ in places[key]:
            _check_module(place_name, module)
    return {key: found[key] for key in places if key in found}


def pattern_for(name: str, mask: Tensor | SparsityPattern, shape: torch.Size) -> SparsityPattern:
    """The pattern of a mask or pattern that fits parameter ``name`` of ``shape``."""
    if not isinstance(mask, SparsityPattern):
        validate_mask(name, mask, torch.empty(shape, device="meta"))
        return SparsityPattern(mask)
    if mask.shape != shape:
        raise ValueError(
            f"pattern for {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(shape)}"
        )
    return mask


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"parameter {name!r} is lazy and has no shape yet: run a forward first")
    if is_sharded(parameter):
        raise ValueError(
            f"parameter {name!r} is a DTensor: call compact(model, masks) before fully_shard or a "
            "tensor-parallel plan"
        )
    if parameter.layout != torch.strided:
        raise ValueError(
            f"parameter {name!r} has layout {parameter.layout}, expected torch.strided: convert it "
            "with to_dense(), its zeros as the mask, or leave it out of the masks"
        )
    if parameter.is_quantized or not parameter.is_floating_point():
        raise TypeError(
            f"parameter {name!r} has dtype {parameter.dtype}: only real floating parameters can "
            "be compact (not complex, integer or quantised ones); leave it out of the masks"
        )
    if type(parameter.data) is not Tensor:
        raise TypeError(
            f"parameter {name!r} is a {type(parameter.data).__name__}: only ordinary tensors can "
            "be compact; leave it out of the masks"
        )
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise ValueError(
            f"parameter {name!r} has gradient hooks, which would see 1-D gradients: remove them "
            "(a hook that masks the gradient is needed no more), or register them after compact "
            "on the module's attribute"
        )


def _check_module(name: str, module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"parameter {name!r} belongs to a ScriptModule, which cannot be compact: use the eager "
            "module, or leave it dense"
        )
    if isinstance(
        module, nn.utils.parametrize.ParametrizationList
    ) or nn.utils.parametrize.is_parametrized(module):
        raise ValueError(
            f"parameter {name!r}, or another of its module, is behind a parametrization: call "
            "torch.nn.utils.parametrize.remove_parametrizations first"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        if module.max_norm is not None:
            raise ValueError(
                f"parameter {name!r} belongs to an Embedding(max_norm={module.max_norm}), which "
                "rescales its weight in every forward: set max_norm=None or leave it dense"
            )
        if module.sparse:
            raise ValueError(
                f"parameter {name!r} belongs to an Embedding(sparse=True), whose gradients are "
                "sparse tensors: set sparse=False or leave it dense"
            )


def unknown_name(name: str, known: list[str], what: str) -> str:
    """Message for a mask whose name is not among ``known``, with the nearest that is."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the model has {', '.join(known[:4])}, …"
    return f"mask for {name!r}: the model has no {what} of that name; {hint}"
