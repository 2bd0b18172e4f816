"""What runs around every optimizer step: checks before, and the count of writes after.

``torch.optim`` offers hooks for all optimizers (``register_optimizer_step_pre_hook``). The checks
run once an optimizer, and once more when its groups or any parameters changed.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparse_comm.kernels.ops import expire_copies

__all__ = [
    "MARK",
    "NEEDS_MATRICES",
    "REPLACED",
    "checked",
    "matrix_optimizer_error",
    "refuse_matrix_optimizer",
    "watch_optimizers",
]

NEEDS_MATRICES = ("Adafactor", "Muon")

# Attribute by which the hooks know values: (name of their parameter, its number of dimensions).
MARK = "_sparse_comm"
# Attribute of a parameter that belongs to no model any more: its name.
REPLACED = "_sparse_comm_replaced"
# How many parameters each optimizer had when it passed the checks.
checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()


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
    """Fused kernels and writes through ``.data`` leave a tensor's version as it was.

    An optimizer that holds no values may step masters of them, which DeepSpeed then copies: of the
    flat buffer that they are pieces of, or of each alone. Other values may be in a graph whose
    backward pass is still to come, and stay as they are.
    """
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if values := [p for p in stepped if hasattr(p, MARK)]:
        increment_version(values)
    else:
        expire_copies(stepped)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if checked.get(optimizer) == count:
        return
    decays = False
    undecayed = None
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        decays |= bool(decay)
        for p in group["params"]:
            if name := getattr(p, REPLACED, None):
                raise RuntimeError(
                    f"{type(optimizer).__name__} holds the parameter {name!r} as it was before "
                    "sparse_comm replaced it (compact, densify or update_masks): build the "
                    "optimizer afterwards, or pass it where that is done: optimizer=optimizer"
                )
            if name_ndim := getattr(p, MARK, None):
                refuse_matrix_optimizer(optimizer)
                if not decay and name_ndim[1] >= 2:
                    undecayed = undecayed or name_ndim[0]
    if decays and undecayed:
        warnings.warn(
            f"{type(optimizer).__name__} decays some weights, but not the matrix {undecayed!r}, "
            "whose values are 1-D: grouping by p.dim() >= 2 puts them with the biases. Use "
            "sparse_comm.param_groups(model, weight_decay), or ignore this if it is meant",
            stacklevel=4,
        )
    checked[optimizer] = count


def refuse_matrix_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that would lose what makes them, with the reason."""
    if (name := type(optimizer).__name__) in NEEDS_MATRICES:
        raise matrix_optimizer_error(name)


def matrix_optimizer_error(name: str) -> TypeError:
    """Why an optimizer of ``NEEDS_MATRICES`` is refused."""
    return TypeError(
        f"{name} works on matrices, and compact values are 1-D: "
        + (
            "it would lose its factored second moment"
            if name == "Adafactor"
            else "it cannot orthogonalise them"
        )
        + "; use an elementwise optimizer (SGD, Adam, AdamW, …), or give it only the parameters "
        "that stay dense"
    )
