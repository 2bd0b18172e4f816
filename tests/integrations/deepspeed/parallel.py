"""Pipelines and experts: models whose ranks hold different parts."""

from __future__ import annotations

import re
import zlib
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from sparse_comm.integrations.deepspeed import pack_checkpoint
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import zero_pruned_
from tests.launch import shared_folder

from .rows import Refused, Rows, Train, by_deepspeed, row
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

    Each stage has a parameter of its own: on one without, DeepSpeed's BF16_Optimizer fails. And one
    of the tied layers has no ``forward_fn``: DeepSpeed saves no weight of those that do.
    """
    return PipelineModule(
        layers=[
            TiedLayerSpec("tie", _ThereAndBack),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            LayerSpec(nn.GELU),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            LayerSpec(nn.GELU),
            LayerSpec(nn.Linear, WIDTH, WIDTH),
            TiedLayerSpec("tie", _ThereAndBack, forward_fn=_there),
        ],
        num_stages=stages,
        loss_fn=_cross_entropy,
        partition_method="uniform",
    )


class _ThereAndBack(nn.Linear):
    """From WIDTH to CLASSES and back, by one weight."""

    def __init__(self) -> None:
        super().__init__(CLASSES, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_there(self, x))


def _there(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.T)


def _cross_entropy(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.float(), labels)


_NO_ZERO_2 = dict.fromkeys((2, 3), Refused("DeepSpeed's pipelines go with 0 and 1 only"))


@row(PIPELINES, "pipeline, tied layers, bf16", _NO_ZERO_2, bf16={"enabled": True})
@row(PIPELINES, "pipeline, tied layers", _NO_ZERO_2)
def _(config: Config, weights: str | None) -> list[float]:
    deepspeed.init_distributed()
    engine = _pipeline_engine(config, weights)
    losses = _train_batches(engine)
    engine.destroy()
    return losses


def _pipeline_engine(config: Config, weights: str | None) -> Any:
    """Masked dense (``weights=None``) or compact."""
    model = pipeline(dist.get_world_size())
    masks = _same_everywhere(model, {name: name for name, _ in model.named_parameters()})
    changed = merged(config, {"gradient_accumulation_steps": 2})
    if weights is None:
        return start(mask_gradients(model, masks), changed)
    engine = start(model, merged(changed, block(_saved(masks), weights=weights)))
    assert sparse_comm.is_compact(engine.module)
    return engine


def _train_batches(engine: Any, first: int = 0) -> list[float]:
    """Losses of six steps of two micro-batches."""
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    data = ((x.to(dtype), y) for x, y in batches(first))
    return [float(engine.train_batch(data)) for _ in range(6)]


def pipelines_go_on_where_they_were(rank: int, world_size: int) -> None:
    """From a compact checkpoint, and from a dense one."""
    deepspeed.init_distributed()
    for stage in (0, 1):
        for saved_as in ("cached", None):
            config = merged(BASE, zero(stage))
            engine, folder = _pipeline_engine(config, saved_as), shared_folder()
            _train_batches(engine)
            engine.save_checkpoint(str(folder))
            expected = _train_batches(engine, 12)
            resumed = _pipeline_engine(config, "transient")
            resumed.load_checkpoint(str(folder))
            assert _train_batches(resumed, 12) == expected


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
    return lambda config, weights: _mixture_losses(config, weights, ep_size)


def _mixture_losses(config: Config, weights: str | None, ep_size: int) -> list[float]:
    """Of masked dense (``weights=None``) or of compact training."""
    engine = _mixture_engine(config, weights, ep_size)
    losses = _train_mixture(engine)
    engine.destroy()
    return losses


def _mixture_engine(config: Config, weights: str | None, ep_size: int) -> Any:
    model, names = mixture(ep_size)
    masks = _same_everywhere(model, names)
    if weights is None:
        return start(mask_gradients(model, masks), merged(config))
    path = _saved({names[name]: mask for name, mask in masks.items()})
    return start(model, merged(config, block(path, weights=weights)))


def _train_mixture(engine: Any, first: int = 0) -> list[float]:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    losses = []
    for seed in range(first, first + 6):
        x, y = batch(seed)
        out, auxiliary = engine(x.to(dtype))
        loss = F.cross_entropy(out.float(), y) + 0.01 * auxiliary
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def experts_go_on_where_they_were(rank: int, world_size: int) -> None:
    """From a compact checkpoint."""
    for stage in (0, 1, 2):
        for ep_size in (1, 2):
            config = merged(BASE, zero(stage))
            engine, folder = _mixture_engine(config, "cached", ep_size), shared_folder()
            _train_mixture(engine)
            engine.save_checkpoint(str(folder))
            expected = _train_mixture(engine, 6)
            resumed = _mixture_engine(config, "transient", ep_size)
            resumed.load_checkpoint(str(folder))
            assert _train_mixture(resumed, 6) == expected
            if stage > 0:
                with pytest.raises(ValueError, match="is a checkpoint of experts, whose optimizer"):
                    pack_checkpoint(folder, folder / "packed")
            dense, folder = _mixture_engine(config, None, ep_size), shared_folder()
            dense.save_checkpoint(str(folder))
            with pytest.raises(ValueError, match="keeps its optimizer's state by experts"):
                resumed.load_checkpoint(str(folder))


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
    path = shared_folder() / "masks.safetensors"
    if dist.get_rank() == 0:
        sparse_comm.save_masks({n: m for part in gathered for n, m in part.items()}, path)
    dist.barrier()
    return str(path)
