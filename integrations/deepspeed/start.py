"""``initialize``: ``deepspeed.initialize`` around a model that it makes compact first."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn

from sparse_comm.compact.convert import compact_by, densify
from sparse_comm.compact.optimizer import Change
from sparse_comm.mask_sync import on_all_ranks

from .autocast import note_lower_precision
from .block import Block, read_block, whole_config
from .engine import watch
from .masks import agreed_patterns
from .names import join_expert_groups
from .partitioned import PartitionedAccess, drop_caches, is_partitioned
from .refuse import check_supported, check_version, zero_stage

__all__ = ["initialize", "listed", "make_compact", "put_in"]


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize``, with compact parameters if the config has an enabled block.

    The block: ``"sparse_comm": {"enabled": true, "masks": "masks.safetensors" | "from_zeros" |
    "from_torch_prune" | "from_deepspeed_compression", "weights": "cached" | "transient"}``.
    ``weights`` is "cached" if not given, "transient" with ZeRO 3. Without the block, or with
    ``"enabled": false``, this is a call of ``deepspeed.initialize`` and nothing else.

    Args:
        args: as in ``deepspeed.initialize``.
        model: dense, its weights as they are to be trained; those that are pruned become zero. It
            may have been built under ``deepspeed.zero.Init``. It becomes compact, in place.
        optimizer: as in ``deepspeed.initialize``. If it holds the dense model's parameters, the
            compact ones take their places and their state.
        model_parameters: parameters of the dense model, or groups of them, for which compact ones
            are put in.
        training_data: as in ``deepspeed.initialize``.
        lr_scheduler: as in ``deepspeed.initialize``.
        distributed_port: as in ``deepspeed.initialize``.
        mpu: as in ``deepspeed.initialize``.
        dist_init_required: as in ``deepspeed.initialize``.
        collate_fn: as in ``deepspeed.initialize``.
        config: as in ``deepspeed.initialize``, with the block.
        mesh_param: as in ``deepspeed.initialize``.
        config_params: as in ``deepspeed.initialize``.

    Returns:
        What ``deepspeed.initialize`` does: (engine, optimizer, dataloader, scheduler).

    Raises:
        FileNotFoundError, ValueError, TypeError, RuntimeError: before an engine exists, on every
            rank, with what to change: a block or masks that are wrong or differ between ranks, a
            config that compact parameters do not go with, an untested DeepSpeed.

    Source: ours. What is compact is SAMO's (Singh & Bhatele, IPDPS 2023, section III).
    """
    given = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "training_data": training_data,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "config": config,
        "mesh_param": mesh_param,
        "config_params": config_params,
    }
    whole = whole_config(args, config, config_params)
    block = None if whole is None else read_block(whole)
    if block is None or whole is None or model is None:
        return deepspeed.initialize(**given)
    deepspeed.init_distributed(
        dist_backend=deepspeed.get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    if model_parameters is not None:
        given["model_parameters"] = model_parameters = listed(model_parameters)
    changes = make_compact(whole, block, model, optimizer, mpu)
    if model_parameters is not None:
        put_in(model_parameters, changes)
    changes.clear()  # or the dense parameters would live as long as this call
    try:
        engine, *others = deepspeed.initialize(**given)
    except BaseException:
        _restore(model, optimizer)
        raise
    return watch(engine), *others


def make_compact(
    config: dict[str, Any], block: Block, model: nn.Module, optimizer: Any = None, mpu: Any = None
) -> list[Change]:
    """Make a model compact for the engine that a config describes. A collective.

    Args:
        config: the whole DeepSpeed config.
        block: of the config, or what is to hold in its place.
        model: dense; the process group is there.
        optimizer: the client's, if there is one; one that holds parameters is carried over.
        mpu: as in ``deepspeed.initialize``.

    Returns:
        The parameters that were replaced.

    Raises:
        Exception: as ``initialize``, on every rank; the model is then as it was.
    """
    on_all_ranks(lambda: _check(config, model, optimizer))
    stage = zero_stage(config)
    weights = block.weights or ("transient" if stage == 3 else "cached")
    join_expert_groups(model, config, mpu)
    patterns = agreed_patterns(block, model, mpu)
    if stage == 3 and weights == "cached":
        nbytes = 2 * sum(pattern.numel for pattern in patterns.values())
        warnings.warn(
            "weights='cached' with ZeRO 3 keeps the dense weights of a micro-batch from forward to "
            f"backward on every rank, unsharded: {nbytes / 1e6:.0f} MB in 16 bits; 'transient', "
            "the default there, keeps none",
            stacklevel=3,
        )
    note_lower_precision(config, model)
    partitioned = any(is_partitioned(parameter) for parameter in model.parameters())
    client = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    changes: list[Change] = []
    compact_by(model, patterns, weights, None, client, PartitionedAccess(), changes)
    if stage == 3:
        drop_caches(model)
    if partitioned:
        gc.collect()  # partitioned parameters are in reference cycles of DeepSpeed's closures
    return changes


def _check(config: dict[str, Any], model: nn.Module, optimizer: Any) -> None:
    check_version()
    check_supported(config, model, optimizer)


def _restore(model: nn.Module, optimizer: Any) -> None:
    """Make the model dense again, for another try, after DeepSpeed has refused it."""
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        client = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        with contextlib.suppress(ValueError, TypeError):  # the reason is raised, not this
            densify(model, client)


def listed(model_parameters: Iterable[Any]) -> list[Any]:
    """Parameters, or groups of them, in lists to be changed; the caller's stay as they are."""
    return [
        {**item, "params": list(item["params"])} if isinstance(item, dict) else item
        for item in model_parameters
    ]


def put_in(items: list[Any], changes: list[Change]) -> None:
    """Put compact parameters in the places of the dense ones that they replace."""
    new = {id(change.old): change.new for change in changes}
    for at, item in enumerate(items):
        if isinstance(item, dict):
            item["params"] = [new.get(id(p), p) for p in item["params"]]
        else:
            items[at] = new.get(id(item), item)
