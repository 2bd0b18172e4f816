"""State dicts into compact tensor-parallel layers.

AxoNN's layers shadow ``_load_from_state_dict`` by an attribute of their own, which cuts whole
weights, asserts that others are of a shard's shape, and goes on to torch: past what compact modules
do, whose class is another by now.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from .layers import cut, full_shape, layers_of

__all__ = ["load_through_axonn"]


def load_through_axonn(model: nn.Module) -> None:
    """Let layers that are compact take whole weights, dense shards and values."""
    for _, layer in layers_of(model):
        if not hasattr(layer, "_compact"):
            continue
        layer._load_from_state_dict = types.MethodType(_load, layer)
        for name, slot in layer._compact.items():
            slot.whole = (full_shape(layer, name), functools.partial(cut, layer, name))


def _load(layer: Any, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """What the layer's class does, after cutting those of its parameters that are not compact."""
    for name, parameter in layer._parameters.items():
        given = state.get(prefix + name)
        if (
            isinstance(given, Tensor)
            and name not in layer._compact
            and parameter is not None
            and given.shape == full_shape(layer, name) != parameter.shape
        ):
            state[prefix + name] = cut(layer, name, given)
    type(layer)._load_from_state_dict(layer, state, prefix, *args)
