"""A stage, or a model of tensor-parallel layers, made compact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparse_comm.compact.convert import compact_by
from sparse_comm.compact.slot import Mode
from sparse_comm.mask_sync import on_all_ranks

from .loading import load_through_axonn
from .masks import agreed_patterns

__all__ = ["make_compact"]


def make_compact(
    model: nn.Module,
    masks: Mapping[str, Any] | None,
    there: Mapping[str, str],
    weights: Mode,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Make it so in place. A collective of all ranks.

    Args:
        model: dense, of this rank.
        masks: by the names of the whole model.
        there: name in the whole model, by name here.
        weights: as in ``sparse_comm.compact``.
        optimizer: built on the model's parameters, to be carried over; or None.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks; where masks do not fit or differ, before
            any model changes.
    """
    patterns = agreed_patterns(model, masks, there)
    on_all_ranks(lambda: compact_by(model, patterns, weights, None, optimizer))
    load_through_axonn(model)
