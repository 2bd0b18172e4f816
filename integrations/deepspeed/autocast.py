"""DeepSpeed's ``torch_autocast``, which finds modules by their exact class.

The engine notes on the parameters of linear and convolutional modules that their gradients travel
in the lower precision. Compact modules are of subclasses, which it would pass over: fp32 gradients
would travel. So the notes are made on the dense parameters, from which compact ones take them over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pydoc import locate
from typing import Any

from deepspeed.runtime.config import (
    get_lower_precision_safe_modules,
    get_torch_autocast_dtype,
    get_torch_autocast_enabled,
)
from deepspeed.runtime.torch_autocast import (
    LOWER_PRECISION_SAFE_MODULES,
    PARAM_COMM_DTYPE_ATTR_NAME,
)
from torch import nn

__all__ = ["note_lower_precision"]


def note_lower_precision(config: Mapping[str, Any], model: nn.Module) -> None:
    """Note on parameters of the dense model what the engine would note on them, if it autocasts."""
    if not get_torch_autocast_enabled(config):
        return
    dtype = get_torch_autocast_dtype(config)
    names = get_lower_precision_safe_modules(config)
    classes = LOWER_PRECISION_SAFE_MODULES if names is None else [locate(name) for name in names]
    for module in model.modules():
        if type(module) in classes:
            for parameter in module.parameters(recurse=False):
                setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, dtype)
