"""For Accelerate and the Hugging Face Trainer, which call ``deepspeed.initialize`` themselves."""

from __future__ import annotations

import os
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import nn

from sparse_comm.compact.optimizer import Change

from .block import Block, read_block
from .engine import watch
from .start import listed, make_compact, put_in

__all__ = ["compact_for_engine", "prepare_engine"]


def compact_for_engine(
    config: dict[str, Any], model: nn.Module, masks: Any, weights: Any, optimizer: Any = None
) -> list[Change]:
    """Make a model compact by the block of a config, or by masks given beside one without it.

    Raises:
        ValueError: masks by both ways or by none; masks that are neither a path nor one of the
            block's words; and as ``initialize``.
    """
    block = read_block(config)
    if (block is None) == (masks is None):
        raise ValueError(
            "masks are to come from the block 'sparse_comm' of the DeepSpeed config or from an "
            f"argument: both are {'absent' if masks is None else 'there'}"
        )
    if block is None:
        if not isinstance(masks, (str, os.PathLike)):
            raise ValueError(
                "with DeepSpeed, masks are the path of a file, or 'from_zeros' and the like: save "
                "them with sparse_comm.save_masks"
            )
        block = Block(os.fspath(masks), weights)
    return make_compact(config, block, model, optimizer)


def prepare_engine(accelerator: Any, objects: tuple[Any, ...], changes: list[Change]) -> Any:
    """``accelerator.prepare(*objects)``, whose engine is then fit for compact parameters.

    Args:
        accelerator: whose plugin is DeepSpeed's.
        objects: as in ``prepare``; the model is compact.
        changes: of ``compact_for_engine``; emptied, or the dense parameters would live on.
    """
    for each in objects:
        if type(each).__name__ == "DummyOptim":  # stands for the config's optimizer
            each.params = listed(each.params)
            put_in(each.params, changes)
    changes.clear()
    prepared = accelerator.prepare(*objects)
    for each in prepared if isinstance(prepared, tuple) else (prepared,):
        if isinstance(each, DeepSpeedEngine):
            watch(each)
    return prepared
