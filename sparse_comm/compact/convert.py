"""``compact`` and ``densify``: a model's parameters to values and back, in place.

All or nothing: everything is checked and every new tensor made before the model is touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sparse_comm.compact.link import memory_format_of
from sparse_comm.compact.module import (
    CompactModule,
    become_compact,
    become_plain,
    compact_slots,
)
from sparse_comm.compact.optimizer import Change, carry_over, check_optimizer, replaced
from sparse_comm.compact.slot import Mode, Slot, is_sharded
from sparse_comm.compact.validate import check_model, check_unwrapped, choose, parameter_places
from sparse_comm.compact.watch import MARK
from sparse_comm.pattern import SparsityPattern

__all__ = [
    "Access",
    "compact",
    "compact_by",
    "densify",
    "is_compact",
    "like",
    "masks_of",
    "patterns_of",
    "values_changed",
]

Model = TypeVar("Model", bound=nn.Module)


def compact(
    model: Model,
    masks: Mapping[str, Tensor | SparsityPattern],
    weights: Mode = "cached",
    compute_dtype: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Model:
    """Turn each masked parameter into the 1-D tensor of its unpruned values, in place.

    ``model.named_parameters()`` then has the values under the parameter's name, and the module's
    attribute gives the dense weight, zero where pruned, as before. Gradients, optimizer state,
    all-reduces, shards and checkpoints follow the values. Weights that are not zero where pruned
    are dropped. Never communicates: see ``check_masks``.

    Call it before wrapping the model (DDP, ``fully_shard``) and before ``torch.compile``.

    Args:
        model: any module.
        masks: bool mask of the parameter's shape (True = unpruned), or pattern, by the name of the
            parameter as in ``model.named_parameters()``. Of tied parameters any name will do.
        weights: "cached" keeps a dense copy of each weight, brought up to date when the values
            changed: fastest. "transient" makes it for each use and again in backward: leanest,
            and the natural mode under FSDP2.
        compute_dtype: floating dtype of the dense weights; None for that of the values.
        optimizer: built on this model's parameters: its groups and state are carried over.

    Returns:
        The same model.

    Raises:
        ValueError: unknown name or mode, wrong shape, two masks for a tied pair, a model that is
            compact already, a parameter or module that cannot be compact, an optimizer whose state
            cannot be carried over. The model is left as it was.
        TypeError: wrong types or dtypes; an optimizer that needs matrices. As above.

    Source: SAMO (Singh & Bhatele, IPDPS 2023, section III) keeps compact states beside a dense
    model; the compact parameter and the transient mode are ours.
    """
    return compact_by(model, masks, weights, compute_dtype, optimizer)


class Access:
    """How ``compact`` reads a parameter: as it stands.

    A framework that partitions parameters before ``compact`` has a subclass of its own.
    """

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """The parameter's whole, dense shape."""
        return parameter.shape

    def values(self, parameter: nn.Parameter, slot: Slot) -> nn.Parameter:
        """A new parameter of the unpruned entries, with the attributes of the old one."""
        with torch.no_grad():
            new = like(parameter, slot.pack(parameter.detach()))
            if parameter.grad is not None:
                new.grad = slot.pack(parameter.grad)
        return new


def compact_by(
    model: Model,
    masks: Mapping[str, Tensor | SparsityPattern],
    weights: Mode,
    compute_dtype: torch.dtype | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    access: Access | None = None,
    changes: list[Change] | None = None,
) -> Model:
    """``compact``, for integrations: with their own ``access`` to parameters.

    ``changes``, if given, gets an entry for each parameter that was replaced.
    """
    check_model(model, weights, compute_dtype)
    access = access or Access()
    changes = [] if changes is None else changes
    places = parameter_places(model)
    chosen = choose(places, masks, access.shape)
    slots = {}
    for key, (name, pattern) in chosen.items():
        old = places[key][0][1]
        slot = Slot(name, pattern.to(old.device), weights, compute_dtype, memory_format_of(old))
        slots[key] = slot
        changes.append(Change(name, old, access.values(old, slot), slot.pack))
    if optimizer is not None:
        check_optimizer(optimizer, changes)
    if empty := [c.name for c in changes if c.old.numel() and not c.new.numel()]:
        warnings.warn(
            f"nothing of {', '.join(map(repr, empty[:3]))}{', …' if empty[3:] else ''} is "
            "unpruned: such a layer passes nothing on (global pruning of an untrained model does "
            "that; scope='layer' does not)",
            stacklevel=3,
        )
    # Nothing below refuses. Modules on the way to a compact one check a whole state dict before
    # torch, which goes down module by module, loads any of it.
    become_compact(model, {})
    for (key, slot), change in zip(slots.items(), changes, strict=True):
        for _, _, module, attribute in places[key]:
            become_compact(module, {attribute: slot})
            module._parameters[attribute] = change.new
        slot.place(change.new)
    for module in list(model.modules()):
        if is_compact(module):
            become_compact(module, {})
    replaced(changes)
    if optimizer is not None:
        carry_over(optimizer, changes)
    return model


def densify(model: Model, optimizer: torch.optim.Optimizer | None = None) -> Model:
    """Give a compact model ordinary parameters again, in place: zero where they were pruned.

    Args:
        model: compact model, not wrapped.
        optimizer: built on its values: groups and state are carried over, zero where pruned.

    Returns:
        The same model; unchanged if it is not compact.

    Raises:
        ValueError: the model is wrapped, or sharded (use ``dense_state_dict``); an optimizer as in
            ``compact``.
    """
    check_unwrapped(model, "densify")
    changes: dict[int, Change] = {}
    for name, module, attribute, slot in compact_slots(model):
        old = module._parameters[attribute]
        assert old is not None
        if is_sharded(old):
            raise ValueError(
                f"parameter {name!r} is sharded; densify the model before fully_shard, or use "
                "sparse_comm.dense_state_dict(model)"
            )
        if id(old) not in changes:
            with torch.no_grad():
                new = like(old, slot.expand(old.detach()))
                if old.grad is not None:
                    new.grad = slot.expand(old.grad)
            changes[id(old)] = Change(name, old, new, slot.expand)
    if optimizer is not None:
        check_optimizer(optimizer, list(changes.values()))
    for _, module, attribute, _ in list(compact_slots(model)):
        module._parameters[attribute] = changes[id(module._parameters[attribute])].new
    for part in list(model.modules()):
        if isinstance(part, CompactModule):
            become_plain(part)
    replaced(list(changes.values()))
    if optimizer is not None:
        carry_over(optimizer, list(changes.values()))
    return model


def values_changed(model: nn.Module) -> None:
    """Say that values were written where torch cannot see it.

    Such writes go through ``.data`` or a pointer, or are collectives on a parameter
    (``torch.distributed.broadcast(p, src=0)``). Cached dense weights are expanded anew at their
    next use. Writes that torch sees (in-place operators, ``load_state_dict``), any
    ``torch.optim.Optimizer``'s step, and DDP's and FSDP2's own collectives need no call.
    """
    for _, module, attribute, slot in compact_slots(model):
        slot.mark_stale()
        values = module._parameters[attribute]
        assert values is not None
        increment_version(values)  # a backward pass still to come uses the values, too


def is_compact(model: nn.Module) -> bool:
    """Whether the model has at least one compact parameter."""
    return next(compact_slots(model), None) is not None


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Bool mask of the dense shape (True = unpruned) of each compact parameter, by its name.

    Tied parameters once, under the name that ``model.named_parameters()`` gives.
    """
    return {name: pattern.to_mask() for name, pattern in patterns_of(model).items()}


def patterns_of(model: nn.Module) -> dict[str, SparsityPattern]:
    """``masks_of``, as patterns."""
    patterns: dict[int, tuple[str, SparsityPattern]] = {}
    for name, _, _, slot in compact_slots(model):
        patterns.setdefault(id(slot), (name, slot.pattern))
    return dict(patterns.values())


def like(old: nn.Parameter, data: Tensor) -> nn.Parameter:
    """A parameter of ``data`` with the attributes and ``requires_grad`` of ``old``."""
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)  # allreduce, tensor_model_parallel, …
    new.__dict__.pop(MARK, None)
    return new
