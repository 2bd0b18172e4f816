"""What does not work together with compact parameters, refused before an engine exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from deepspeed import PipelineModule
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from torch import nn

from sparse_comm import is_compact
from sparse_comm.cli.versions import BOUNDS, within
from sparse_comm.compact.watch import NEEDS_MATRICES, matrix_optimizer_error

from .partitioned import is_partitioned

__all__ = ["check_supported", "check_version", "zero_stage"]


def check_version() -> None:
    """Refuse a DeepSpeed that the tests do not run with: what is hooked may have changed.

    Raises:
        RuntimeError: naming the version and what to install.
    """
    version = metadata.version("deepspeed")
    bounds = BOUNDS["deepspeed"]
    if not within(version, bounds):
        raise RuntimeError(
            f"DeepSpeed {version} is outside the range that sparse_comm is tested with: "
            f'pip install "deepspeed{bounds}", or switch the sparse_comm block off'
        )


def zero_stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage that a config asks for."""
    stage = _at(config, "zero_optimization", "stage")
    return int(stage or 0)


def check_supported(config: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
    """Refuse configs that would train something else than the masked dense model, or fail late.

    Args:
        config: the whole DeepSpeed config.
        model: dense.
        optimizer: the client's, if there is one: an optimizer or what makes one.

    Raises:
        ValueError: naming what to change in the config.
        TypeError: the optimizer needs matrices.
    """
    stage = zero_stage(config)
    if stage != 3 and any(is_partitioned(p) for p in model.parameters()):
        raise ValueError(
            f"the model was built under deepspeed.zero.Init, which is for ZeRO 3, but "
            f"'zero_optimization.stage' is {stage}: build it without, or set the stage to 3"
        )
    if stage >= 2 and isinstance(model, PipelineModule):
        raise ValueError(
            f"'zero_optimization.stage' is {stage}, but DeepSpeed's pipelines go with 0 and 1 only"
        )
    if is_compact(model):
        raise ValueError(
            "the model is compact already: give it to deepspeed.initialize, without the block "
            "'sparse_comm', and the engine to watch of this module"
        )
    for optimizer_name in _optimizer_names(config, optimizer):
        plain = optimizer_name.lower().replace("_", "")
        if plain.startswith(("onebit", "zerooneadam")):
            raise ValueError(
                f"the optimizer {optimizer_name} compresses gradients itself, from dense ones, "
                "and DeepSpeed has removed it: use AdamW, whose gradients are compact here"
            )
        for name in NEEDS_MATRICES:
            if plain.startswith(name.lower()):
                raise matrix_optimizer_error(name)
    for path, why in _REFUSED.items():
        value = _at(config, *path.split("."))
        if not _is_off(value):
            raise ValueError(
                f"{path!r} of the DeepSpeed config is {_short(value)}, which the block "
                f"'sparse_comm' does not go with: {why}; remove it, or switch the block off"
            )
    for part in ("offload_optimizer", "offload_param"):
        if (device := _at(config, "zero_optimization", part, "device")) == "nvme":
            raise ValueError(
                f"'zero_optimization.{part}.device' is {device!r}: offloading compact parameters "
                "to NVMe is not tested; use 'cpu'"
            )
    if _at(config, "fp16", "enabled") and not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"'fp16' is enabled, but DeepSpeed's {get_accelerator().device_name()} accelerator "
            "says that this machine has no fp16: use 'bf16'"
        )
    if optimizer is None:
        _refuse_without_kernel(config)


def _refuse_without_kernel(config: Mapping[str, Any]) -> None:
    """Build the kernel of DeepSpeed's own optimizer, as the engine would, if the config has it.

    DeepSpeed compiles it at its first use, and keeps it.
    """
    name = str(_at(config, "optimizer", "type")).lower()
    if name not in _KERNELS or _at(config, "optimizer", "params", "torch_adam"):
        return
    offload = get_zero_config(dict(config)).offload_optimizer
    kernel = _KERNELS[name][offload is not None and offload.device != OffloadDeviceEnum.none]
    builder = get_accelerator().create_op_builder(f"{kernel}Builder") if kernel else None
    if builder is None:
        return
    try:
        builder.load(verbose=False)
    except Exception as error:
        raise ValueError(
            f"the kernel of DeepSpeed's {kernel} cannot be built here: install what it needs (on a "
            "CPU a C++ compiler, which $CXX may name, and ninja), or use AdamW with 'torch_adam': "
            f"true in 'optimizer.params' of the config, which is torch's; it failed with: {error}"
        ) from error


# By the optimizer's type: its kernel, and that of an offloaded one.
_KERNELS = {
    "adam": ("FusedAdam", "CPUAdam"),
    "adamw": ("FusedAdam", "CPUAdam"),
    "adagrad": (None, "CPUAdagrad"),
    "lion": ("FusedLion", "CPULion"),
}


# Dotted path in the config: why it is refused.
_REFUSED = {
    "sparse_gradients": "it sends coordinates beside values, and DeepSpeed has removed it",
    "compression_training": "DeepSpeed has removed it; masks come from 'masks' of the block",
    "hybrid_engine.enabled": "its inference kernels read dense parameters",
    "compile.deepcompile": "its passes gather and release parameters by their dense shapes",
    "tensor_parallel.autotp_size": "AutoTP cuts dense weights, after which masks do not fit",
    "expert_parallel.enabled": "AutoEP stacks dense experts anew, after which masks do not fit",
    "zero_optimization.zenflow": "it picks columns of dense gradients",
    "zero_optimization.offload_optimizer.super_offload": "not tested with compact parameters",
    "zero_optimization.zero_hpz_partition_size": "not tested with compact parameters",
    "zero_optimization.zero_quantized_weights": "not tested with compact parameters",
    "zero_optimization.zero_quantized_nontrainable_weights": "not tested with compact parameters",
    "zero_optimization.zero_quantized_gradients": "not tested with compact parameters",
    "zero_optimization.mics_shard_size": "not tested with compact parameters",
}


def _optimizer_names(config: Mapping[str, Any], optimizer: Any) -> Iterator[str]:
    """Of the client's optimizer, or of the config's, which DeepSpeed uses if there is no other."""
    if optimizer is None:
        if name := _at(config, "optimizer", "type"):
            yield str(name)
    elif hasattr(optimizer, "param_groups"):
        yield type(optimizer).__name__
    elif name := getattr(optimizer, "__name__", ""):  # a class, or a function that makes one
        yield str(name)


def _at(config: Mapping[str, Any], *path: str) -> Any:
    found: Any = config
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def _is_off(value: Any) -> bool:
    """Whether a setting is as if it were not there; sizes of one rank are."""
    return value in (None, False, {}) or (type(value) is int and value <= 1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
