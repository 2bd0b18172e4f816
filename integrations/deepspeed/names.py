"""Names that mean the same on all ranks.

A parameter's own name does, but for experts: with expert parallelism each rank numbers its own from
zero. Masks, in files and between ranks, go by the names of the model with ``ep_size=1``, which are
also those of DeepSpeed's expert checkpoints.
"""

from __future__ import annotations

from typing import Any

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from deepspeed.utils.bwc import (
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)
from torch import nn

__all__ = ["global_names", "join_expert_groups"]

_EXPERTS = "deepspeed_moe.experts.deepspeed_experts"


def join_expert_groups(model: nn.Module, config: dict[str, Any], mpu: Any) -> None:
    """Make the process groups of the model's experts, as the engine will. A collective."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if layers and mpu is not None:
        groups.mpu = mpu
    data_first = config.get("use_data_before_expert_parallelism", False)
    for layer in layers:
        # As layer.set_deepspeed_parallelism, which can be called once only.
        if layer.expert_group_name in groups._get_expert_parallel_group_dict():
            continue
        if groups.mpu is None or not layer.enable_expert_tensor_parallelism:
            groups._create_expert_and_data_parallel(
                layer.ep_size, use_data_before_expert_parallel_=data_first
            )
        else:
            groups._create_expert_data_and_model_parallel(
                layer.ep_size, mpu=groups.mpu, use_data_before_expert_parallel_=data_first
            )


def global_names(model: nn.Module, mpu: Any) -> dict[str, str]:
    """Name in the whole model of each parameter, by its name on this rank; tied ones once.

    Parameters that a client's ``mpu`` splits over model-parallel ranks have the rank in their
    name: each holds another piece.
    """
    names = {name: name for name, _ in model.named_parameters()}
    for path, layer in model.named_modules():
        if isinstance(layer, MoE) and layer.ep_size > 1:
            first = groups._get_expert_parallel_rank(layer.expert_group_name)
            first *= layer.num_local_experts
            for expert in range(layer.num_local_experts):
                here = f"{path}.{_EXPERTS}.{expert}." if path else f"{_EXPERTS}.{expert}."
                there = here.removesuffix(f"{expert}.") + f"{first + expert}."
                for name in names:
                    if name.startswith(here):
                        names[name] = there + name.removeprefix(here)
    rank = _model_parallel_rank(mpu)
    if rank is not None:
        names = {name: f"{there} (model-parallel rank {rank})" for name, there in names.items()}
    return names


def _model_parallel_rank(mpu: Any) -> int | None:
    if mpu is None or bwc_tensor_model_parallel_world_size(mpu) == 1:
        return None
    return int(bwc_tensor_model_parallel_rank(mpu))
