"""Masks: which entries of which parameters are unpruned, ``dict[name, bool tensor]``.

True stands where an entry is unpruned. Names are those of ``model.named_parameters()``, so a
parameter that stands in several places has one mask, under its first name.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparse_comm.pattern import SparsityPattern

__all__ = ["masks_from_torch_prune", "masks_from_zeros", "patterns_from_masks", "validate_mask"]


def masks_from_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a model whose pruned weights are zeros, as saved checkpoints of pruned models are.

    A parameter gets a mask, False at its zeros (0.0 and -0.0), if it is of floating point, has two
    or more dimensions and holds a zero. So that nothing is frozen at zero that only *starts* there:

    - parameters of one dimension (biases, norm weights) get none; add one by hand if they are
      pruned: ``masks["conv.bias"] = model.conv.bias != 0``;
    - a parameter that is all zero (LoRA's B, a zero-initialised projection) gets none, with a
      warning; if it is wholly pruned, add ``torch.zeros_like(parameter, dtype=torch.bool)``;
    - an embedding whose only zeros are the row of its ``padding_idx`` is taken as dense.

    Args:
        model: not modified. Not compact, and not pruned by ``torch.nn.utils.prune`` at present.

    Returns:
        Bool masks of the parameters' shapes, on their devices; empty, with a warning, if no
        parameter qualifies.

    Raises:
        ValueError: a parameter has no data yet (meta device, lazy), or the model is still pruned
            through ``torch.nn.utils.prune``.

    Source: ours.
    """
    return masks_from_zeros_by(model, lambda parameter: contextlib.nullcontext())


def masks_from_zeros_by(
    model: nn.Module, whole: Callable[[nn.Parameter], AbstractContextManager[Any]]
) -> dict[str, Tensor]:
    """``masks_from_zeros`` of a model whose parameters have their data in a context only."""
    if prune.is_pruned(model):
        raise ValueError(
            "the model is pruned through torch.nn.utils.prune, which keeps the pruned entries' "
            "values: use masks_from_torch_prune"
        )
    padding = {
        id(module._parameters.get("weight")): module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    masks, all_zero = {}, []
    for name, parameter in model.named_parameters():
        require_data(name, parameter)
        with whole(parameter):
            if not parameter.is_floating_point() or parameter.ndim < 2:
                continue
            mask = parameter.detach() != 0
        if mask.numel() and not mask.any():
            all_zero.append(name)
        elif not _all_but_row(mask, padding.get(id(parameter))):
            masks[name] = mask
    if all_zero:
        warnings.warn(
            f"parameters that are all zero get no mask and stay dense: {_some(all_zero)}; if one "
            "is wholly pruned, set masks[name] = torch.zeros_like(parameter, dtype=torch.bool)",
            stacklevel=3,
        )
    if not masks:
        warnings.warn(
            "no parameter of two or more dimensions is partly zero: there are no masks",
            stacklevel=3,
        )
    return masks


def masks_from_torch_prune(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a model pruned with ``torch.nn.utils.prune``, made permanent in place.

    Each pruned tensor becomes an ordinary parameter again, as by ``prune.remove``: it bears its
    own name (``weight``, not ``weight_orig``), is zero where pruned (+0.0 exactly) and stands at
    the same place in the order of parameters. It is the same ``Parameter`` object, so an optimizer
    built on the pruned model goes on training it. The masks are those of the pruning: an unpruned
    entry that happens to be zero stays unpruned.

    Args:
        model: modified. Where two modules share a pruned parameter, it gets one mask; if only one
            of them pruned it, pruning holds for both from now on, and a warning says so.

    Returns:
        Bool masks of the parameters' shapes, on their devices, biases and other 1-D parameters
        included; empty, with a warning, if nothing is pruned.

    Raises:
        ValueError: two modules prune the parameter they share differently, or a pruned tensor's
            ``_orig`` or ``_mask`` is gone or has no data. The model is then unchanged.

    Source: ours.
    """
    pruned = _pruned_tensors(model)
    mask_of = _one_mask_each(pruned)
    _warn_of_unpruned_uses(model, pruned)
    for module in {id(p.module): p.module for p in pruned}.values():
        _remove_hooks(module)
    with torch.no_grad():
        for found in pruned:  # multiplying by the mask left -0.0, and NaN where it was inf
            found.original.masked_fill_(~mask_of[id(found.original)], 0)
    if not pruned:
        warnings.warn(
            "no parameter is pruned through torch.nn.utils.prune: there are no masks; if the "
            "pruning was made permanent already, use masks_from_zeros",
            stacklevel=2,
        )
    return {n: mask_of[id(p)] for n, p in model.named_parameters() if id(p) in mask_of}


@dataclass(frozen=True)
class _Pruned:
    """A tensor that ``torch.nn.utils.prune`` prunes: ``module.tensor_name``."""

    path: str  # of the module
    module: nn.Module
    tensor_name: str
    original: nn.Parameter
    mask: Tensor

    @property
    def name(self) -> str:
        return _join(self.path, self.tensor_name)


def _pruned_tensors(model: nn.Module) -> list[_Pruned]:
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        for hook in module._forward_pre_hooks.values():
            if not isinstance(hook, prune.BasePruningMethod):
                continue
            tensor_name = hook._tensor_name
            original = module._parameters.get(f"{tensor_name}_orig")
            mask = module._buffers.get(f"{tensor_name}_mask")
            name = _join(path, tensor_name)
            if original is None or mask is None or mask.shape != original.shape:
                raise ValueError(
                    f"{name!r} has a pruning hook but not the parameter {tensor_name}_orig and "
                    f"the buffer {tensor_name}_mask of its shape; prune it anew"
                )
            require_data(name, original)
            if mask.is_meta:
                raise ValueError(f"the pruning mask of {name!r} is on the meta device")
            found.append(_Pruned(path, module, tensor_name, original, mask != 0))
    return found


def _one_mask_each(pruned: list[_Pruned]) -> dict[int, Tensor]:
    """The mask of each pruned parameter, by the parameter's id."""
    first: dict[int, _Pruned] = {}
    for found in pruned:
        other = first.setdefault(id(found.original), found)
        if not torch.equal(other.mask, found.mask.to(other.mask.device)):
            raise ValueError(
                f"{other.name!r} and {found.name!r} are one parameter, but pruned differently; "
                "prune both with one mask (prune.custom_from_mask) or untie them"
            )
    return {key: found.mask.to(found.original.device) for key, found in first.items()}


def _warn_of_unpruned_uses(model: nn.Module, pruned: list[_Pruned]) -> None:
    name_of = {id(found.original): found.name for found in pruned}
    as_pruned = {f"{found.name}_orig" for found in pruned}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in name_of and name not in as_pruned:
            warnings.warn(
                f"{name!r} is the same parameter as {name_of[id(parameter)]!r}, but only the "
                "latter was pruned: from now on both are",
                stacklevel=3,
            )


def _remove_hooks(module: nn.Module) -> None:
    """``prune.remove`` all, but keep the order of parameters: optimizers save state by it."""
    hooks = module._forward_pre_hooks.values()
    names = [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]
    own_name = {f"{name}_orig": name for name in names}
    order = [own_name.get(key, key) for key in module._parameters]
    for name in names:
        prune.remove(module, name)
    for key in order:
        module._parameters[key] = module._parameters.pop(key)


def validate_mask(name: str, mask: Tensor, parameter: Tensor) -> None:
    """Refuse a mask that does not fit its parameter.

    Args:
        name: the parameter's, for the message.
        mask: should be a bool tensor of the parameter's shape, on any device but meta.
        parameter: dense, any dtype.

    Raises:
        TypeError: not a tensor, not of dtype bool, sparse, or without data (meta device).
        ValueError: wrong shape; a transposed one is called so.

    Source: ours.
    """
    _check_mask(name, mask)
    if mask.shape == parameter.shape:
        return
    message = (
        f"mask for {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
    )
    if parameter.ndim >= 2 and mask.shape == parameter.mT.shape:
        message += ": it is transposed; pass mask.mT"
    elif mask.numel() == parameter.numel():
        message += ": the same number of entries, but another layout; permute or reshape it"
    raise ValueError(message)


def patterns_from_masks(
    masks: Mapping[str, Tensor | SparsityPattern],
) -> dict[str, SparsityPattern]:
    """The masks as bits, on the CPU, in their order.

    Raises:
        TypeError: not a mapping of strings to bool tensors with data; the message names the mask.

    Source: ours.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must be a dict of bool tensors by name, got {type(masks).__name__}")
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"masks are named by strings, got {name!r}")
        if not isinstance(mask, SparsityPattern):
            _check_mask(name, mask)
    return {
        name: (mask if isinstance(mask, SparsityPattern) else SparsityPattern(mask)).to("cpu")
        for name, mask in masks.items()
    }


def require_data(name: str, parameter: Tensor) -> None:
    """Refuse a parameter whose entries cannot be looked at.

    Raises:
        ValueError: it is lazy, or on the meta device.
    """
    if nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name!r} is a lazy parameter without a shape; run a forward pass first")
    if parameter.is_meta:
        raise ValueError(f"{name!r} is on the meta device; load the weights first")


def _check_mask(name: str, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask for {name!r} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask for {name!r} must have dtype torch.bool, got {mask.dtype}; pass mask != 0"
        )
    if mask.is_meta:
        raise TypeError(f"mask for {name!r} is on the meta device: it holds no data")
    if mask.layout != torch.strided:
        raise TypeError(
            f"mask for {name!r} must be a dense tensor, got {mask.layout}; pass mask.to_dense()"
        )


def _all_but_row(mask: Tensor, row: int | None) -> bool:
    """Whether the mask is True everywhere, or everywhere but in that row."""
    if row is None:
        return bool(mask.all())
    return bool(mask[:row].all() and mask[row + 1 :].all())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _some(names: list[str]) -> str:
    rest = len(names) - 5
    return ", ".join(map(repr, names[:5])) + (f" and {rest} more" if rest > 0 else "")
