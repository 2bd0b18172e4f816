"""Optimizers over compact parameters: carrying groups and state over, and weight-decay groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.watch import REPLACED, checked, refuse_matrix_optimizer

__all__ = [
    "Change",
    "carry_over",
    "check_optimizer",
    "param_groups",
    "replaced",
]


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
    refuse_matrix_optimizer(optimizer)
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


def replaced(changes: Sequence[Change]) -> None:
    """Remember, for optimizers that hold them, that these parameters train nothing any more."""
    for change in changes:
        setattr(change.old, REPLACED, change.name)
    checked.clear()


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
