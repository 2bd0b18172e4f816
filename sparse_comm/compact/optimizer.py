"""Optimizers over compact parameters: carrying state over, what is refused, and their writes.

The checks run in a step pre-hook that ``torch.optim`` offers to all optimizers
(``register_optimizer_step_pre_hook``): once an optimizer, and once more when its groups or any
parameters changed. A post-hook counts each step as a write to the values.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.slot import MARK

__all__ = [
    "Change",
    "carry_over",
    "check_optimizer",
    "param_groups",
    "replaced",
    "watch_optimizers",
]

NEEDS_MATRICES = ("Adafactor", "Muon")


@dataclass
class Change:
    """One parameter that another takes the place of."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    convert: Callable[[Tensor], Tensor]  # from a tensor of old's shape to one of new's shape


def check_optimizer(optimizer: torch.optim.Optimizer, changes: Sequence[Change]) -> None:
    """Refuse an optimizer that could not be carried over, before anything is changed.

    Raises:
        TypeError: not a ``torch.optim.Optimizer``, or one that needs matrices.
        ValueError: it holds none of the parameters, or state of a shape that is neither the
            parameter's nor a single number.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    _refuse_matrix_optimizer(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if changes and not any(id(change.old) in held for change in changes):
        raise ValueError(
            f"the optimizer holds none of the parameters that change ({changes[0].name!r}, …): "
            "pass the one that was built on this model's parameters"
        )
    for change in changes:
        for key, value in optimizer.state.get(change.old, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != change.old.shape:
                raise ValueError(
                    f"state {key!r} of {type(optimizer).__name__} for {change.name!r} has shape "
                    f"{tuple(value.shape)}, neither a number nor the parameter's "
                    f"{tuple(change.old.shape)}: it cannot be carried over; build the optimizer "
                    "anew on the compact model"
                )


def carry_over(optimizer: torch.optim.Optimizer, changes: Sequence[Change]) -> None:
    """Put the new parameters in the old ones' groups and convert their state."""
    new = {id(change.old): change.new for change in changes}
    for group in optimizer.param_groups:
        # in place: LBFGS keeps the list itself
        group["params"][:] = [new.get(id(p), p) for p in group["params"]]
    for change in changes:
        state = optimizer.state.pop(change.old, None)
        if state is not None:
            optimizer.state[change.new] = {
                key: change.convert(value)
                if isinstance(value, Tensor) and value.shape == change.old.shape and key != "step"
                else value
                for key, value in state.items()
            }


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups with weight decay for matrices and none for vectors and numbers.

    A parameter counts as what its dense weight is: values are 1-D, so the usual test
    ``p.dim() >= 2`` would switch weight decay off for every compact parameter. On a model without
    compact parameters the groups are the usual ones. Frozen parameters are left out.

    Args:
        model: compact or plain model.
        weight_decay: of the first group.

    Returns:
        Two groups for any ``torch.optim`` optimizer; an empty one is left out.

    Source: ours.
    """
    ndim = {
        id(module._parameters[name]): len(slot.pattern.shape)
        for _, module, name, slot in compact_slots(model)
    }
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = ndim.get(id(parameter), parameter.dim()) >= 2
            (decay if matrix else rest).append(parameter)
    groups = ((decay, weight_decay), (rest, 0.0))
    return [{"params": params, "weight_decay": wd} for params, wd in groups if params]


_REPLACED = "_sparse_comm_replaced"  # attribute of a parameter that belongs to no model any more
# How many parameters each optimizer had when it passed the checks.
_checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


def replaced(changes: Sequence[Change]) -> None:
    """Remember, for optimizers that hold them, that these parameters train nothing any more."""
    for change in changes:
        setattr(change.old, _REPLACED, change.name)
    _checked.clear()


@functools.cache
def watch_optimizers() -> None:
    """From the first compact parameter of the process on.

    The hooks run outside compiled code: there, fused kernels would leave the version alone, too.
    (``disable`` imports the compiler, a second; so does building an optimizer, but not importing
    this package.)
    """
    register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Fused kernels and writes through ``.data`` leave a tensor's version as it was."""
    increment_version(
        [p for group in optimizer.param_groups for p in group["params"] if hasattr(p, MARK)]
    )


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _checked.get(optimizer) == count:
        return
    decays = False
    undecayed = None
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        decays |= bool(decay)
        for p in group["params"]:
            if name := getattr(p, _REPLACED, None):
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds the parameter {name!r} as it was before "
                    "sparse_comm replaced it (compact, densify or update_masks): build the "
                    "optimizer afterwards, or pass it: compact(model, masks, optimizer=optimizer)"
                )
            if name_ndim := getattr(p, MARK, None):
                _refuse_matrix_optimizer(optimizer)
                if not decay and name_ndim[1] >= 2:
                    undecayed = undecayed or name_ndim[0]
    if decays and undecayed:
        warnings.warn(
            f"{type(optimizer).__name__} decays some weights, but not the matrix {undecayed!r}, "
            "whose values are 1-D: grouping by p.dim() >= 2 puts them with the biases. Use "
            "sparse_comm.param_groups(model, weight_decay), or ignore this if it is meant",
            stacklevel=4,
        )
    _checked[optimizer] = count


def _refuse_matrix_optimizer(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if name in NEEDS_MATRICES:
        raise TypeError(
            f"{name} works on matrices, and compact values are 1-D: "
            + (
                "it would lose its factored second moment"
                if name == "Adafactor"
                else "it cannot orthogonalise them"
            )
            + "; use an elementwise optimizer (SGD, Adam, AdamW, …), or give it only the "
            "parameters that stay dense"
        )
