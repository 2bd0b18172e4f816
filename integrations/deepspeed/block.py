"""The ``sparse_comm`` block of a DeepSpeed config: what it may hold, and how it is found."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import deepspeed

from sparse_comm.compact.slot import MODES, Mode
from sparse_comm.pipeline import CODECS

__all__ = ["BLOCK", "NOT_A_PATH", "Block", "mentions_block", "read_block", "whole_config"]

BLOCK = "sparse_comm"
# Values of ``masks`` that are no path to a file.
NOT_A_PATH = ("from_zeros", "from_torch_prune", "from_deepspeed_compression")


@dataclass(frozen=True)
class Block:
    """A valid block that is enabled.

    Attributes:
        masks: path of a file that ``sparse_comm.save_masks`` wrote, or one of ``NOT_A_PATH``.
        weights: as in ``sparse_comm.compact``; None for what suits the ZeRO stage: "transient" in
            stage 3, else "cached".
        pipeline_codec: of ``pack_sends``, for models that are pipelines.
        enabled: true.
    """

    masks: str
    weights: Mode | None = None
    pipeline_codec: str = "auto"
    enabled: bool = True


def whole_config(args: Any, config: Any, config_params: Any) -> dict[str, Any] | None:
    """The config that ``deepspeed.initialize`` will read, as a dict; None if it was given none.

    Raises:
        ValueError: neither a dict nor the path of a file, as DeepSpeed says.
    """
    given = config if config is not None else config_params
    for old in ("deepspeed_config", "deepscale_config"):
        given = given if given is not None else getattr(args, old, None)
    return None if given is None else deepspeed.load_ds_config(given)


def read_block(config: Mapping[str, Any]) -> Block | None:
    """The block of a config; None if there is none, or it is not enabled.

    Raises:
        ValueError: the block has a key or a value that is not known; the message names it and the
            nearest that is.
    """
    if BLOCK not in config:
        if other := _misspelt(config):
            raise ValueError(
                f"the DeepSpeed config has a block {other!r}, which nothing reads: do you mean "
                f"{BLOCK!r}?"
            )
        return None
    given = config[BLOCK]
    if not isinstance(given, Mapping):
        raise _wrong(f"it must be an object such as {{'enabled': true, …}}, got {given!r}")
    known = [field.name for field in fields(Block)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(known)}"
            raise _wrong(f"unknown key {key!r}; {hint}")
    enabled = given.get("enabled", True)
    if not isinstance(enabled, bool):
        raise _wrong(f"'enabled' must be true or false, got {enabled!r}")
    if not enabled:
        return None
    masks = given.get("masks")
    if not isinstance(masks, str) or not masks:
        raise _wrong(
            "'masks' must be the path of a file of sparse_comm.save_masks or one of "
            f"{', '.join(map(repr, NOT_A_PATH))}, got {masks!r}"
        )
    weights = given.get("weights")
    if weights is not None and weights not in MODES:
        near = difflib.get_close_matches(str(weights), MODES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _wrong(f"'weights' must be 'cached' or 'transient', got {weights!r}{hint}")
    codec = given.get("pipeline_codec", "auto")
    if codec not in CODECS:
        names = ", ".join(map(repr, CODECS))
        raise _wrong(f"'pipeline_codec' must be one of {names}, got {codec!r}")
    return Block(masks, weights, codec)


def mentions_block(config: Mapping[str, Any]) -> bool:
    """Whether the config has the block, or what may be meant to be it."""
    return BLOCK in config or _misspelt(config) is not None


def _misspelt(config: Mapping[str, Any]) -> str | None:
    return next(iter(difflib.get_close_matches(BLOCK, list(config), n=1, cutoff=0.8)), None)


def _wrong(what: str) -> ValueError:
    return ValueError(f"the block {BLOCK!r} of the DeepSpeed config: {what}")
