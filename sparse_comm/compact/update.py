"""``update_masks``: other masks on compact parameters, with values and optimizer state kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from sparse_comm.compact.convert import like
from sparse_comm.compact.module import CompactModule
from sparse_comm.compact.optimizer import Change, carry_over, check_optimizer, replaced
from sparse_comm.compact.slot import Slot, is_sharded
from sparse_comm.compact.validate import check_unwrapped, pattern_for, unknown_name
from sparse_comm.pattern import SparsityPattern

__all__ = ["update_masks"]

Model = TypeVar("Model", bound=nn.Module)


def update_masks(
    model: Model,
    new_masks: Mapping[str, Tensor | SparsityPattern],
    optimizer: torch.optim.Optimizer | None = None,
) -> Model:
    """Change the masks of compact parameters, in place, keeping values and optimizer state.

    Entries that stay unpruned keep value and state; entries that grow start at zero. The values
    become new parameters, so wrap the model (DDP, FSDP2) anew afterwards.

    Args:
        model: compact model, not wrapped.
        new_masks: as for ``compact``, of compact parameters only; the others keep their masks.
        optimizer: built on the values: groups and state are carried over.

    Raises:
        ValueError: a name is not that of a compact parameter, a shape is wrong, the model is
            wrapped or sharded, or as ``compact``. The model is left as it was.
        TypeError: as ``compact``.
    """
    check_unwrapped(model, "update_masks")
    if not isinstance(new_masks, Mapping):
        raise TypeError(f"masks must be a dict of name to mask, got {type(new_masks).__name__}")
    slots = {
        name: (module, attribute, slot) for name, module, attribute, slot in _slots_by_name(model)
    }
    if unknown := [name for name in new_masks if name not in slots]:
        raise ValueError(unknown_name(unknown[0], list(slots), "compact parameter"))
    patterns: dict[int, SparsityPattern] = {}
    changes: dict[int, tuple[Slot, Change]] = {}
    for name, mask in new_masks.items():
        module, attribute, slot = slots[name]
        old = module._parameters[attribute]
        assert old is not None
        if is_sharded(old):
            raise ValueError(
                f"parameter {name!r} is sharded; update its mask before fully_shard, on a model "
                "that loads sparse_comm.dense_state_dict(model)"
            )
        pattern = pattern_for(name, mask, slot.pattern.shape).to(old.device)
        if patterns.setdefault(id(slot), pattern) != pattern:
            raise ValueError(
                f"tied parameter {name!r} has two different masks: give one mask, or the same for "
                "all its names"
            )
        if id(slot) in changes:
            continue
        target = Slot(slot.name, pattern, "transient", None)

        def convert(t: Tensor, slot: Slot = slot, target: Slot = target) -> Tensor:
            return target.pack(slot.expand(t))

        with torch.no_grad():
            new = like(old, convert(old.detach()))
            if old.grad is not None:
                new.grad = convert(old.grad)
        changes[id(slot)] = slot, Change(name, old, new, convert)
    if optimizer is not None:
        check_optimizer(optimizer, [change for _, change in changes.values()])
        carry_over(optimizer, [change for _, change in changes.values()])
    for module, attribute, slot in slots.values():
        if id(slot) in changes:
            module._parameters[attribute] = changes[id(slot)][1].new
    for key, (slot, change) in changes.items():
        slot.pattern = patterns[key]
        slot.place(change.new)
    replaced([change for _, change in changes.values()])
    return model


def _slots_by_name(model: nn.Module) -> list[tuple[str, CompactModule, str, Slot]]:
    """As ``compact_slots``, with modules that stand at several places under each name."""
    return [
        (f"{path}.{name}" if path else name, module, name, slot)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, CompactModule)
        for name, slot in module._compact.items()
    ]
