"""Pipelines: weights that layers on several stages share."""

from __future__ import annotations

from typing import Any

from deepspeed import PipelineModule
from torch import nn

__all__ = ["share_values"]


def share_values(model: nn.Module) -> None:
    """Let stages sum the gradients of what a pipeline's tied layers share: of values, not weights.

    DeepSpeed reads the shared weights off the tied modules by the name of their attribute, and
    reduces their gradients in place. The attribute gives a dense weight here, whose gradient is a
    dense copy. Has no effect on models that are no pipelines.
    """
    if isinstance(model, PipelineModule):
        model._recursive_getattr = _parameter  # of this model alone


def _parameter(module: nn.Module, name: str) -> Any:
    """The parameter of that name itself, where a tied module has one."""
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    found = owner._parameters.get(attribute)
    return getattr(owner, attribute) if found is None else found
