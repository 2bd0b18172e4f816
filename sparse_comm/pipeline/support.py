"""Of which entries of a tensor the gradient counts: what autograd knows of how it was made.

Where a ReLU gave zero its derivative is zero, so that whatever gradient arrives there is dropped by
the stage that it comes back to. This reads the graph behind a tensor, as far back as that ReLU, and
answers only where it is certain, underflow included: the square of 1e-30 is zero in fp32 and has a
derivative, so that of squares the entries that went in count, not those that came out.

What it does not answer for: nodes that are not torch's own (a name tells: theirs end in a digit);
tensors and nodes with hooks, which may look at the whole gradient; tensors in between that cannot
be found, so that nobody knows of their hooks (torch keeps those of views, powers, products with
themselves and pools; of the others a row of torch's layers is known to give them to nobody);
tensors that were written to since; values that autograd does not keep itself (checkpointing would
compute them anew to show them).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Origin", "Support", "drop_origin", "pass_origin", "set_origin", "support_of"]

_KIND = re.compile(r"(\w+?)Backward\d+")
_VIEWS = {
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Unsqueeze",
    "Squeeze",
}  # in the same order
_OTHER_VIEWS = {"Permute", "Transpose", "T", "Slice", "Select", "Split", "Narrow"}
_LARGEST = {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D"}
_COPIES = {"Clone", "IndexSelect"} | _LARGEST
_STARTS = {"Relu", "Threshold", "Hardtanh", "Mul"}
_KNOWN = _STARTS | _VIEWS | _OTHER_VIEWS | _COPIES | {"Pow", "ToCopy"}


@dataclass(frozen=True)
class Support:
    """The entries of which the gradient counts.

    Attributes:
        entries: a tensor in the same row-major order: its non-zeros count, besides the tensor's
            own; None if these are all.
        guards: whether the others are dropped by a product with zero, which keeps inf and NaN.
        checks: whether autograd itself notices if the tensor was written to.
    """

    entries: Tensor | None = None
    guards: bool = False
    checks: bool = False


@dataclass(frozen=True)
class Origin:
    """What a tensor's graph does not tell of it.

    Attributes:
        source: the tensor that its last operation was given, for its hooks.
        unseen: whether nobody but torch has had the tensors that it was made from, back to a ReLU.
    """

    source: Tensor | None = None
    unseen: Callable[[], bool] | None = None


def set_origin(tensor: Tensor, origin: Origin) -> None:
    """Say how a tensor was made. The source lives as long as the tensor."""
    tensor._sparse_comm_origin = origin  # type: ignore[attr-defined]


def pass_origin(tensor: Tensor, source: Tensor) -> None:
    """Say that ``tensor`` was made from ``source``, if somebody wants to know of that one."""
    if hasattr(source, "_sparse_comm_origin"):
        set_origin(tensor, Origin(source=source))


def drop_origin(tensor: Tensor | None) -> None:
    """Let go of the sources: a tensor that was sent lives on until its gradient comes."""
    while tensor is not None and hasattr(tensor, "_sparse_comm_origin"):
        source = _origin(tensor).source
        del tensor._sparse_comm_origin
        tensor = source


def _origin(tensor: Tensor | None) -> Origin:
    found = getattr(tensor, "_sparse_comm_origin", None)
    return found if isinstance(found, Origin) else Origin()


def support_of(tensor: Tensor) -> Support | None:
    """Where the gradient of a tensor counts; None if that is not known, or everywhere.

    Args:
        tensor: with its graph, of which backward has not run yet.

    Source: ours.
    """
    if tensor.grad_fn is None:
        return None
    try:
        found = _support(tensor.grad_fn, tensor, None)
    except Exception:  # what it was made from was overwritten, or a node is another than it seems
        return None
    if found is None or (not found.checks and tensor._version > 0):
        return None
    if found.entries is not None and found.entries.numel() != tensor.numel():
        return None
    return found


def _is_looked_at(made_by: Any, tensor: Tensor | None) -> bool:
    """Whether somebody may look at the whole gradient of a node's output."""
    if tensor is not None:
        hooks = (tensor._backward_hooks or {}).values()
        # DeepSpeed's own scale the entries.
        if any(not str(getattr(h, "__module__", "")).startswith("deepspeed.") for h in hooks):
            return True
        if tensor.retains_grad:
            return True
    return any(
        _has_hooks(register) for register in (made_by.register_prehook, made_by.register_hook)
    )


def _has_hooks(register: Callable[[Callable[..., None]], Any]) -> bool:
    """Of a node: one more tells of the others."""
    handle = register(lambda *_: None)
    hooks = handle.hooks_dict_ref()
    handle.remove()
    return hooks is None or len(hooks) > 0


def _support(
    made_by: Any, tensor: Tensor | None, unseen: Callable[[], bool] | None
) -> Support | None:
    """Of the output of a node: ``tensor``, where it can be found, else it must be ``unseen``."""
    unseen = _origin(tensor).unseen or unseen
    if tensor is None and (unseen is None or not unseen()):
        return None
    match = _KIND.fullmatch(made_by.name())
    kind = match[1] if match else ""
    if kind not in _KNOWN or _is_looked_at(made_by, tensor):
        return None
    inputs = [node for node, _ in made_by.next_functions]
    if kind == "Relu":
        return Support(checks=True)
    if kind == "Threshold":
        return Support() if made_by._saved_threshold >= 0 else None
    if kind == "Hardtanh":  # ReLU6
        return Support() if made_by._saved_min_val >= 0 else None
    if kind == "Mul":
        return _of_product(made_by, tensor, unseen)
    if not inputs or inputs[0] is None:
        return None
    before = _support(inputs[0], _given_to(made_by, kind, tensor), unseen)
    if before is None or kind in _VIEWS:
        return before
    if kind == "Pow" and made_by._saved_exponent > 0:
        return before if before.entries is not None else _given(_saved(made_by, "self"))
    if kind == "ToCopy":
        return before if before.entries is not None else _given(_output(inputs[0]))
    if before.entries is not None:  # in another order, or of other entries
        return None
    if kind in _OTHER_VIEWS:
        return before
    return Support() if kind in _COPIES else None


def _given_to(made_by: Any, kind: str, tensor: Tensor | None) -> Tensor | None:
    """The tensor that a node was given, with its hooks; None if it cannot be found."""
    found = _origin(tensor).source
    if found is None and kind in _VIEWS | _OTHER_VIEWS:
        found = None if tensor is None else tensor._base
    elif found is None and kind in _LARGEST | {"Pow", "Mul"}:
        found = _saved(made_by, "self")
    is_it = found is not None and found.grad_fn is made_by.next_functions[0][0]
    return found if is_it else None


def _given(entries: Tensor | None) -> Support | None:
    return None if entries is None else Support(entries.detach())


def _saved(node: Any, name: str) -> Tensor | None:
    """What a node keeps; None if it is kept by hooks, which would have work to do."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", "unknown") is not None:
        return None
    found = getattr(node, f"_saved_{name}")
    return found if isinstance(found, Tensor) else None


def _output(node: Any) -> Tensor | None:
    """Of a ReLU, which autograd keeps."""
    return _saved(node, "result") if node.name() == "ReluBackward0" else None


def _of_product(
    made_by: Any, tensor: Tensor | None, unseen: Callable[[], bool] | None
) -> Support | None:
    """A product of a ReLU with itself, or of anything with constants: dropout, which has zeros."""
    inputs = made_by.next_functions
    if len(inputs) != 2:
        return None
    first, second = inputs[0][0], inputs[1][0]
    if first is not None and inputs[0] == inputs[1]:
        before = _support(first, _given_to(made_by, "Mul", tensor), unseen)
        if before is None or before.entries is not None:
            return before
        return _given(_saved(made_by, "self"))
    if tensor is None or (first is None) == (second is None):
        return None
    factor = _saved(made_by, "other" if first is not None else "self")
    node = first if first is not None else second
    before = _support(node, None, unseen)
    if factor is None or factor.shape != tensor.shape:
        if before is None:  # scaled as a whole
            return None
        return before if before.entries is not None else _given(_output(node))
    live = factor != 0
    if before is not None:
        entries = _output(node) if before.entries is None else before.entries
        if entries is not None and entries.shape == live.shape:
            live &= entries != 0
    return Support(live, guards=True)
