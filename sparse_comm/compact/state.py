"""State dicts of compact models: what is refused, what is packed, and the dense one."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from sparse_comm.compact.link import warn_dropped
from sparse_comm.compact.module import CompactModule, compact_slots
from sparse_comm.compact.slot import Slot, is_sharded
from sparse_comm.mask_sync import compare_digests

__all__ = ["check_masks", "check_state", "dense_state_dict", "expand_state", "pack_state"]

_EXTRA = "_extra_state"


def check_state(model: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Refuse a state that does not fit, before anything of it is loaded.

    Args:
        model: compact model, or a module of one.
        state: state dict; values or dense weights under the parameters' names.
        prefix: of the model's names in ``state``.

    Raises:
        RuntimeError: a shape is neither that of the values nor the dense one, or the state's
            values belong to another pattern. Nothing was loaded.
    """
    problems = []
    unsigned = []
    for path, module in model.named_modules():
        if not isinstance(module, CompactModule) or not module._compact:
            continue
        at = prefix + (f"{path}." if path else "")
        digests = _digests(state.get(at + _EXTRA), module)
        for name, slot in module._compact.items():
            given = state.get(at + name)
            if not isinstance(given, Tensor):
                continue
            if _is_dense(given, slot):
                if is_sharded(module._parameters[name]):
                    problems.append(
                        f"{at + name!r} is sharded here and dense in the state: load dense states "
                        "before fully_shard"
                    )
                continue
            nnz, shape = slot.pattern.nnz, tuple(slot.pattern.shape)
            own = module._parameters[name]
            # of the values, or as a framework that keeps them elsewhere leaves the parameter
            if tuple(given.shape) != (nnz,) and (own is None or given.shape != own.shape):
                problems.append(
                    f"{at + name!r} has shape {tuple(given.shape)}, expected its dense shape "
                    f"{shape} or its values ({nnz},)"
                )
            elif digests is None:
                unsigned.append((at, name, module))
            elif digests.get(name) != slot.pattern.digest():
                problems.append(
                    f"{at + name!r} holds the values of another pattern (digest "
                    f"{digests.get(name)}, this model's {slot.pattern.digest()}); load it into a "
                    "model with the same masks, or load a dense state (sparse_comm."
                    "dense_state_dict)"
                )
    if problems:
        more = f"\n\t… and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise RuntimeError(
            "state dict does not fit the compact model; nothing was loaded into it:\n\t"
            + "\n\t".join(problems[:8])
            + more
        )
    for at, _, module in unsigned:  # said below, once: the modules inside check again
        state.setdefault(at + _EXTRA, module.get_extra_state())
    if unsigned:
        warnings.warn(
            f"the state dict has values of {unsigned[0][0] + unsigned[0][1]!r}"
            + (f" and {len(unsigned) - 1} more" if len(unsigned) > 1 else "")
            + " without the digest of their pattern (its '_extra_state' keys are gone); they are "
            "loaded as values of this model's pattern",
            stacklevel=5,
        )


def pack_state(module: CompactModule, state: dict[str, Any], prefix: str) -> None:
    """Put values in place of the dense weights that ``state`` has for ``module``."""
    for name, slot in module._compact.items():
        given = state.get(prefix + name)
        if isinstance(given, Tensor) and _is_dense(given, slot):
            pattern = slot.pattern
            moved = given.detach().to(pattern.device)
            if slot.whole is not None and moved.shape == slot.whole[0] != pattern.shape:
                moved = slot.whole[1](moved)
            packed = slot.pack(moved)
            if not moved.is_meta and moved.count_nonzero() > packed.count_nonzero():
                warn_dropped(slot.name)
            state[prefix + name] = packed


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """What a plain model would have saved: dense weights, zero where pruned, no digests.

    Args:
        model: compact model; under FSDP2 this is a collective, as all parameters are gathered,
            whole, on every rank.

    Returns:
        State dict of new dense tensors in the values' dtype for the compact parameters, and of
        the model's own tensors for all others; it loads into the plain model.

    Source: ours.
    """
    return expand_state(model, model.state_dict())


def expand_state(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` of a compact model with dense weights in place of values, and without digests."""
    state = copy.copy(state)  # with its _metadata, the versions of the modules
    for name, value in state.items():
        if is_sharded(value):
            state[name] = value.full_tensor()
    tied: dict[tuple[int, int], Tensor] = {}  # what is tied stays so: it is saved once
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, CompactModule):
            continue
        prefix = f"{path}." if path else ""
        for name, slot in module._compact.items():
            values = state.get(prefix + name)
            if values is None or tuple(values.shape) != (slot.pattern.nnz,):
                continue
            key = (id(slot), values.data_ptr())
            if key not in tied or not values.numel():
                with torch.no_grad():
                    pattern = slot.pattern.to(values.device)
                    dense = Slot(slot.name, pattern, "transient", None, slot.memory_format)
                    tied[key] = dense.expand(values)
            state[prefix + name] = tied[key]
        extra = state.pop(prefix + _EXTRA, None)
        if isinstance(extra, dict) and "module" in extra:
            state[prefix + _EXTRA] = extra["module"]
    return state


def _is_dense(given: Tensor, slot: Slot) -> bool:
    """Whether ``given`` is the dense weight; 1-D with nothing pruned it is both, and the same."""
    shapes = (slot.pattern.shape, slot.whole and slot.whole[0])
    return given.shape in shapes and tuple(given.shape) != (slot.pattern.nnz,)


def _digests(extra: Any, module: CompactModule) -> dict[str, str] | None:
    """Digest by parameter name, as ``CompactModule.get_extra_state`` wrote them."""
    if isinstance(extra, dict):
        extra = extra.get("patterns")
    names = sorted(module._compact)
    if not isinstance(extra, Tensor) or extra.dtype != torch.uint8:
        return None
    if tuple(extra.shape) != (len(names), 16):
        return {}
    return {name: bytes(row).hex() for name, row in zip(names, extra.cpu().tolist(), strict=True)}


def check_masks(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Stop every rank if their masks differ. A collective: all ranks of the group call it.

    Masks of equal density give values of equal size, which DDP and FSDP2 would mix in silence.
    Call it once, after ``compact`` and before wrapping or training.

    Args:
        model: compact model.
        group: process group; the default one if not given.

    Raises:
        ValueError: on every rank, naming the parameters and the ranks.

    Source: ours.
    """
    compare_digests(
        {name: slot.pattern.digest() for name, _, _, slot in compact_slots(model)}, group
    )
