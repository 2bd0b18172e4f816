"""Pipelines and experts: models whose ranks hold different parts."""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import zero_pruned_

from .rows import Losses, Refused, Rows, Train, by_deepspeed, row
from .training import (
    BASE,
    CLASSES,
    WIDTH,
    Config,
    Masks,
    batch,
    batches,
    block,
    mask_gradients,
    merged,
    start,
    zero,
)

PIPELINES: Rows = {}
EXPERTS: Rows = {}

# ---------------------------------------------------------------- pipelines


def pipeline(stages: int) -> PipelineModule:
    """Seven layers, the first and the last of one weight.

    Each stage has a parameter of its own: on one without, DeepSpeed's BF16_Optimizer fails.
    """
    tied = ("tie", nn.Linear, CLASSES, WIDTH, False)
    return PipelineModule(
        layers=[
            TiedLayerSpec(*tied, forward_fn=_there_and_back),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            LayerSpec(nn.GELU),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            LayerSpec(nn.GELU),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            TiedLayerSpec(*tied, forward_fn=_there),
        ],
        num_stages=stages,
        loss_fn=_cross_entropy,
        partition_method="uniform",
    )


def _there(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.T)


def _there_and_back(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(_there(layer, x))


def _cross_entropy(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.float(), labels)


_NO_ZERO_2 = dict.fromkeys((2, 3), Refused("DeepSpeed's pipelines go with 0 and 1 only"))


@row(PIPELINES, "pipeline of as many stages as ranks, tied layers", _NO_ZERO_2)
@row(PIPELINES, "the same in bf16", {0: "=", **_NO_ZERO_2}, bf16={"enabled": True})
def _(config: Config, weights: str) -> Losses:
    """By ``train_batch`` of two micro-batches."""
    found = []
    deepspeed.init_distributed()
    refused = config["zero_optimization"]["stage"] > 1  # by DeepSpeed with less to read
    for is_compact in (True,) if refused else (False, True):
        model = pipeline(dist.get_world_size())
        masks = _same_everywhere(model, {name: name for name, _ in model.named_parameters()})
        changed = merged(config, {"gradient_accumulation_steps": 2})
        if is_compact:
            changed = merged(changed, block(_saved(masks), weights=weights))
        else:
            mask_gradients(model, masks)
        engine = start(model, changed)
        dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
        data = ((x.to(dtype), y) for x, y in batches())
        found.append([float(engine.train_batch(data)) for _ in range(6)])
        if is_compact:
            assert sparse_comm.is_compact(engine.module)
        engine.destroy()
    return found[0], found[1]


# ---------------------------------------------------------------- experts


class Mixture(nn.Module):
    """Four experts over ``ep_size`` ranks, between two linear layers."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        expert = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.mixture = MoE(
            WIDTH, expert, num_experts=4, ep_size=ep_size, capacity_factor=4.0, use_rts=False
        )
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, auxiliary, _ = self.mixture(torch.tanh(self.first(x)))
        return self.last(out), auxiliary


def mixture(ep_size: int) -> tuple[Mixture, dict[str, str]]:
    """The model, and the names that its parameters have with ``ep_size=1``."""
    model = Mixture(ep_size)
    first = (dist.get_rank() % ep_size) * (4 // ep_size)

    def shifted(found: re.Match[str]) -> str:
        return f"deepspeed_experts.{int(found[1]) + first}."

    names = {
        name: re.sub(r"deepspeed_experts\.(\d+)\.", shifted, name)
        for name, _ in model.named_parameters()
    }
    return model, names


def _of_mixture(ep_size: int) -> Train:
    return lambda config, weights: (
        _mixture_losses(config, None, ep_size),
        _mixture_losses(config, weights, ep_size),
    )


def _mixture_losses(config: Config, weights: str | None, ep_size: int) -> list[float]:
    """Of masked dense (``weights=None``) or of compact training."""
    model, names = mixture(ep_size)
    masks = _same_everywhere(model, names)
    if weights is None:
        mask_gradients(model, masks)
    else:
        path = _saved({names[name]: mask for name, mask in masks.items()})
        config = merged(config, block(path, weights=weights))
    engine = start(model, merged(config))
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    losses = []
    for seed in range(6):
        x, y = batch(seed)
        out, auxiliary = engine(x.to(dtype))
        loss = F.cross_entropy(out.float(), y) + 0.01 * auxiliary
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


_NO_ZERO_3 = {3: by_deepspeed("not supported with ZeRO Stage 3")}
for _size in (1, 2):
    row(EXPERTS, f"experts, `ep_size` {_size}", _NO_ZERO_3)(_of_mixture(_size))
    row(EXPERTS, f"experts, `ep_size` {_size}, bf16", _NO_ZERO_3, bf16={"enabled": True})(
        _of_mixture(_size)
    )


def experts_do_not_depend_on_ep_size(rank: int, world_size: int) -> None:
    """In fp32; in bf16 they do, dense and compact alike."""
    for stage in (0, 1, 2):
        config = merged(BASE, zero(stage))
        assert _mixture_losses(config, "cached", 1) == _mixture_losses(config, "cached", 2)


# ---------------------------------------------------------------- both


def _same_everywhere(model: nn.Module, names: dict[str, str]) -> Masks:
    """Give parameters of one name one weight and one mask, on whichever rank they are."""
    masks = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(names[name].encode()))
            numbers = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((numbers - 0.5) * 0.5)
            if parameter.dim() > 1:
                masks[name] = torch.rand(parameter.shape, generator=generator) < 0.3
    zero_pruned_(model, masks)
    return masks


def _saved(masks: Masks) -> str:
    """A file of the masks of all ranks. A collective."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, masks)
    path = [os.path.join(tempfile.mkdtemp(), "masks.safetensors")]
    dist.broadcast_object_list(path)
    if dist.get_rank() == 0:
        sparse_comm.save_masks({n: m for part in gathered for n, m in part.items()}, path[0])
    dist.barrier()
    return path[0]
