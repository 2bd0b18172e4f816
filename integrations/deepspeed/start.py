"""``initialize``: ``deepspeed.initialize`` around a model that it makes compact first."""

from __future__ import annotations

import functools
import gc
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed
import torch
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from torch import nn

from sparse_comm.compact.convert import compact_by, densify
from sparse_comm.compact.optimizer import Change
from sparse_comm.compact.validate import choose, parameter_places
from sparse_comm.compact.watch import REPLACED, refuse_matrix_optimizer
from sparse_comm.mask_sync import gather, on_all_ranks

from .autocast import note_lower_precision
from .block import Block, mentions_block, read_block, whole_config
from .engine import follow
from .masks import agreed_patterns
from .names import join_expert_groups
from .partitioned import PartitionedAccess, drop_caches, is_partitioned
from .refuse import check_supported, check_version, zero_stage
from .sends import is_plain, pack_sends

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
    "from_torch_prune" | "from_deepspeed_compression", "weights": "cached" | "transient",
    "pipeline_codec": "auto" | "channels" | "zeros" | "dense"}``. ``weights`` is "cached" if not
    given, "transient" with ZeRO 3; ``pipeline_codec``, of pipelines, is "auto" (``pack_sends``).
    Without the block, or with ``"enabled": false``, this is a call of ``deepspeed.initialize`` and
    nothing else.

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
    if whole is None or model is None or not mentions_block(whole):
        return deepspeed.initialize(**given)
    deepspeed.init_distributed(
        dist_backend=deepspeed.get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    # As the engine will: collectives before it are to run on this rank's device.
    deepspeed.get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    block = on_all_ranks(lambda: read_block(whole))
    # The file of masks may lie elsewhere on each machine; the masks themselves are compared later.
    kinds = gather(
        "off"
        if block is None
        else f"'weights': {block.weights!r}, 'pipeline_codec': {block.pipeline_codec!r}"
    )
    if len(set(kinds)) > 1:
        ranks = "; ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise ValueError(
            f"the blocks 'sparse_comm' of the ranks' configs differ ({ranks}): give all ranks one"
        )
    if block is None:
        return deepspeed.initialize(**given)
    if model_parameters is not None:
        given["model_parameters"] = model_parameters = listed(model_parameters)
        on_all_ranks(lambda: refuse_replaced(model_parameters))
    changes = make_compact(whole, block, model, optimizer, mpu)
    if model_parameters is not None:
        put_in(model_parameters, changes)
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        given["optimizer"] = _checked(optimizer)
    changes.clear()  # or the dense parameters would live as long as this call
    try:
        engine, *others = deepspeed.initialize(**given)
    except BaseException:
        _restore(model, optimizer)
        raise
    follow(engine)
    if is_plain(engine):
        pack_sends(engine, block.pipeline_codec)
    elif block.pipeline_codec not in ("auto", "dense"):
        warnings.warn(
            f"pipeline_codec={block.pipeline_codec!r} has no effect: the model is no pipeline of "
            "which the schedule is known",
            stacklevel=2,
        )
    return engine, *others


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
        Exception: as ``initialize``, on every rank; the model is then as it was, but for pruning of
            ``torch.nn.utils.prune`` that was made permanent.
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
    access = PartitionedAccess()
    on_all_ranks(lambda: choose(parameter_places(model), patterns, access.shape))
    note_lower_precision(config, model)
    partitioned = any(is_partitioned(parameter) for parameter in model.parameters())
    client = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
    changes: list[Change] = []
    compact_by(model, patterns, weights, None, client, access, changes)
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
    if any(is_partitioned(parameter) for parameter in model.parameters()):
        return
    try:
        densify(model, optimizer if isinstance(optimizer, torch.optim.Optimizer) else None)
    except (ValueError, TypeError):  # DeepSpeed has put its own tensors into the optimizer
        densify(model)


def _checked(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``make``, whose optimizer is refused if it would not train the compact parameters."""

    @functools.wraps(make, assigned=("__name__", "__doc__"))
    def made(parameters: Any) -> Any:
        optimizer = make(parameters)
        if isinstance(optimizer, torch.optim.Optimizer):
            refuse_matrix_optimizer(optimizer)
            refuse_replaced(optimizer.param_groups)
        return optimizer

    return made


def listed(model_parameters: Iterable[Any]) -> list[Any]:
    """Parameters, or groups of them, in lists to be changed; the caller's stay as they are."""
    return [
        {**item, "params": _group(item["params"])} if isinstance(item, dict) else item
        for item in model_parameters
    ]


def _group(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def put_in(items: list[Any], changes: list[Change]) -> None:
    """Put compact parameters in the places of the dense ones that they replace."""
    new = {id(change.old): change.new for change in changes}
    for at, item in enumerate(items):
        if isinstance(item, dict):
            put_in(item["params"], changes)
        elif isinstance(item, tuple):  # (name, parameter)
            items[at] = (item[0], new.get(id(item[1]), item[1]))
        else:
            items[at] = new.get(id(item), item)


def refuse_replaced(items: Iterable[Any]) -> None:
    """Refuse parameters that belong to no model any more, and would train nothing.

    Raises:
        ValueError: naming one.
    """
    for item in items:
        if isinstance(item, dict):
            refuse_replaced(_group(item["params"]))
            continue
        parameter = item[1] if isinstance(item, tuple) else item
        if (name := getattr(parameter, REPLACED, None)) is not None:
            raise ValueError(
                f"the optimizer is to train the parameter {name!r} as it was before sparse_comm "
                "replaced it: list the model's parameters anew, right before initialize"
            )
