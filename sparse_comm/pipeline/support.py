"""Of which entries of a tensor the gradient counts: what autograd knows of how it was made.

Where a ReLU gave zero its derivative is zero, so that whatever gradient arrives there is dropped by
the stage that it comes back to. This reads the graph behind a tensor, as far back as that ReLU, and
answers only where it is certain, underflow included: the square of 1e-30 is zero in fp32 and has a
derivative, so that of squares the entries that went in count, not those that came out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Support", "support_of"]

_SAME_ORDER = {"View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "Unsqueeze", "Squeeze"}
_OTHER_ORDER = {"Permute", "Transpose", "T", "Slice", "Select", "Split", "Narrow", "IndexSelect"}
_LARGEST = {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "MkldnnMaxPool2D"}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Support:
    """The entries of which the gradient counts.

    Attributes:
        entries: a tensor in the same row-major order, not zero at those; None if the tensor itself
            is one.
        guards: whether the others are dropped by a product with zero, which keeps inf and NaN.
    """

    entries: Tensor | None = None
    guards: bool = False


def support_of(tensor: Tensor) -> Support | None:
    """Where the gradient of a tensor counts; None if that is not known, or everywhere.

    Args:
        tensor: with its graph, of which backward has not run yet.

    Source: ours.
    """
    if tensor.grad_fn is None:
        return None
    try:
        return _support(tensor.grad_fn, tensor)
    except RuntimeError:  # what it was made from was overwritten, or is no longer kept
        return None


def _support(made_by: Any, tensor: Tensor | None) -> Support | None:
    """Of the output of a node; ``tensor``, where it is at hand."""
    kind = made_by.name().partition("Backward")[0]
    inputs = [node for node, _ in made_by.next_functions]
    if kind == "Relu":
        return Support()
    if kind == "Threshold":
        return Support() if made_by._saved_threshold >= 0 else None
    if kind == "Hardtanh":  # ReLU6
        return Support() if made_by._saved_min_val >= 0 else None
    if kind == "Mul":
        return _of_product(made_by, inputs, tensor)
    if not inputs or inputs[0] is None:
        return None
    before = _support(inputs[0], None) if kind in _KNOWN else None
    if before is None or kind in _SAME_ORDER:
        return before
    if kind == "Pow" and made_by._saved_exponent > 0:
        return before if before.entries is not None else _given(made_by._saved_self, before)
    if kind == "ToCopy":
        return before if before.entries is not None else _given(_output(inputs[0]), before)
    if before.entries is None and kind in _OTHER_ORDER | _LARGEST:
        return before
    return None


_KNOWN = _SAME_ORDER | _OTHER_ORDER | _LARGEST | {"Pow", "ToCopy"}


def _given(entries: Tensor | None, before: Support) -> Support | None:
    return None if entries is None else Support(entries.detach(), before.guards)


def _output(node: Any) -> Tensor | None:
    """Of a ReLU, which autograd keeps."""
    return node._saved_result if node.name().startswith("Relu") else None


def _of_product(made_by: Any, inputs: list[Any], tensor: Tensor | None) -> Support | None:
    """A product of a ReLU with itself, or of anything with constants: dropout, which has zeros."""
    if len(inputs) != 2:
        return None
    if inputs[0] is inputs[1] and inputs[0] is not None:
        before = _support(inputs[0], None)
        if before is None or before.entries is not None:
            return before
        return _given(made_by._saved_self, before)
    if tensor is None or inputs.count(None) != 1:
        return None
    first = inputs[0] is not None
    factor = made_by._saved_other if first else made_by._saved_self
    node = inputs[0] if first else inputs[1]
    before = _support(node, None)
    if not isinstance(factor, Tensor) or factor.shape != tensor.shape:
        if before is None:  # scaled as a whole
            return None
        return before if before.entries is not None else _given(_output(node), before)
    if tensor.itemsize not in _INTEGER:
        return None
    live = factor != 0
    if before is not None:
        entries = _output(node) if before.entries is None else before.entries
        if entries is not None and entries.shape == live.shape:
            live &= entries != 0
    # What is sent must hold all that is not zero: inf times zero is NaN, and -1 times zero -0.0.
    live |= tensor.detach().contiguous().view(_INTEGER[tensor.itemsize]) != 0
    return Support(live, guards=True)
