"""What one model on two ranks is trained with: rows of the table in docs/deepspeed.md."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import cpuinfo
import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from .rows import Refused, Rows, Train, by_deepspeed, row
from .training import (
    CLASSES,
    WIDTH,
    Config,
    block,
    engine_of,
    loss_of,
    losses_of,
    mask_gradients,
    merged,
    mlp,
    pruned,
    start,
    zero,
)

ROWS: Rows = {}


def plain(config: Config, weights: str | None) -> list[float]:
    return losses_of(engine_of(config, weights))


def of(make: Callable[[], nn.Module]) -> Train:
    return lambda config, weights: losses_of(engine_of(config, weights, make))


# ---------------------------------------------------------------- precision

row(ROWS, "fp32")(plain)
row(ROWS, "bf16", bf16={"enabled": True})(plain)
row(
    ROWS,
    "bf16, gradients accumulated in fp32",
    {0: by_deepspeed("unsupported mix")},
    bf16={"enabled": True},
    data_types={"grad_accum_dtype": "fp32"},
)(plain)


@row(ROWS, "fp16", where="if the machine has it", fp16={"enabled": True})
def _(config: Config, weights: str | None) -> list[float]:
    if get_accelerator().is_fp16_supported():
        return plain(config, weights)
    with pytest.raises(ValueError, match="no fp16"):
        start(pruned()[0], merged(config, block()))
    return [0.0]


row(ROWS, "`torch_autocast`, bf16", torch_autocast={"enabled": True, "dtype": "bfloat16"})(plain)

# ---------------------------------------------------------------- steps and gradients


@row(ROWS, "gradient accumulation", gradient_accumulation_steps=2)
def _(config: Config, weights: str | None) -> list[float]:
    return losses_of(engine_of(config, weights), accumulate=2)


row(ROWS, "`managed_gradient_accumulation: false`", managed_gradient_accumulation=False)(plain)


row(ROWS, "gradient clipping", 1e-6, gradient_clipping=0.05)(plain)
row(ROWS, "small buckets", zero_optimization={"reduce_bucket_size": 1000})(plain)
row(
    ROWS,
    "`overlap_comm`, `round_robin_gradients`",
    zero_optimization={"overlap_comm": True, "round_robin_gradients": True},
)(plain)
row(ROWS, "`reduce_scatter: false`", zero_optimization={"reduce_scatter": False})(plain)
row(
    ROWS,
    "`prescale_gradients`",
    dict.fromkeys((2, 3), by_deepspeed("not yet supported")),
    prescale_gradients=True,
)(plain)


@row(ROWS, "`engine.no_sync()`", dict.fromkeys((2, 3), by_deepspeed("no_sync context manager")))
def _(config: Config, weights: str | None) -> list[float]:
    engine = engine_of(config, weights)
    with engine.no_sync():
        engine.backward(loss_of(engine, 50))
    return losses_of(engine)


# ---------------------------------------------------------------- optimizers and offloading

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
row(ROWS, "DeepSpeed's FusedAdam (its default)", 1e-6, optimizer={"params": {"torch_adam": None}})(
    plain
)
_cpu_info = functools.cache(cpuinfo.get_cpu_info)


@row(
    ROWS,
    "optimizer offloaded, DeepSpeed's CPUAdam",
    1e-6,
    optimizer={"params": {"torch_adam": None}},
    zero_optimization=OFFLOAD,
)
def _(config: Config, weights: str | None) -> list[float]:
    with mock.patch("cpuinfo.get_cpu_info", _cpu_info):  # each CPUAdam asks, for a second
        return plain(config, weights)


row(
    ROWS,
    "optimizer offloaded, torch's AdamW",
    zero_optimization=OFFLOAD,
)(plain)
row(ROWS, "parameters offloaded", zero_optimization={"offload_param": {"device": "cpu"}})(plain)
row(
    ROWS,
    "SGD",
    optimizer={"type": "SGD", "params": {"torch_adam": None}},
    zero_allow_untested_optimizer=True,
)(plain)
row(ROWS, "Adagrad", optimizer={"type": "Adagrad", "params": {"torch_adam": None}})(plain)


def _with(arguments: Callable[[nn.Module], dict[str, Any]]) -> Train:
    """With arguments of ``initialize`` that are made from the dense model."""
    return lambda config, weights: losses_of(engine_of(config, weights, arguments=arguments))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]


row(ROWS, "groups in `model_parameters`")(_with(lambda m: {"model_parameters": groups(m)}))
row(ROWS, "the client's optimizer, with groups", optimizer=None)(
    _with(lambda m: {"optimizer": torch.optim.AdamW(groups(m), lr=1e-2), "model_parameters": None})
)
row(ROWS, "a function that makes the optimizer", optimizer=None)(
    _with(lambda m: {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)})
)

# ---------------------------------------------------------------- models


class Tied(nn.Module):
    """Two layers of one weight, which is used without a module besides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, CLASSES)
        self.out = nn.Linear(WIDTH, CLASSES, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) + self.embed(
            torch.tanh(nn.functional.linear(self.embed(x), self.out.weight.T))
        )


class Convolutions(nn.Module):
    """With BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)
        )
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.reshape(-1, 2, 4, 4)).mean((-1, -2)))


class Checkpointed(nn.Module):
    """Activations are computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for part in self.blocks:
            x = checkpoint(part, x, use_reentrant=False)
        return self.last(x)


class Partial(nn.Module):
    """A frozen layer, one that is not used, and one of which nothing is left."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, 64).requires_grad_(False)
        self.unused = nn.Linear(64, 64)
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(x)))


row(ROWS, "tied weights, a weight used without its module")(of(Tied))
row(ROWS, "convolutions, BatchNorm")(of(Convolutions))
row(ROWS, "activation checkpointing")(of(Checkpointed))
row(ROWS, "frozen and unused parameters")(of(Partial))


def one_layer() -> nn.Module:
    """As little as can be: in ZeRO 3 dynamo traces DeepSpeed's hooks, too, for seconds a layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, CLASSES))


@row(ROWS, "`engine.compile()`")
def _(config: Config, weights: str | None) -> list[float]:
    torch._dynamo.reset()  # or, after eight models of one class, nothing would be compiled
    counters.clear()
    is_slow = config["zero_optimization"]["stage"] == 3
    engine = engine_of(config, weights, one_layer if is_slow else mlp)
    engine.compile(backend="aot_eager")
    losses = losses_of(engine, steps=3)
    assert counters["aot_autograd"]["ok"] > 0
    return losses


_ZERO_3 = dict.fromkeys((0, 1, 2), Refused("which is for ZeRO 3"))


@row(ROWS, "model built under `deepspeed.zero.Init`", _ZERO_3)
@row(ROWS, "model built under `deepspeed.zero.Init`, bf16", _ZERO_3, bf16={"enabled": True})
def _(config: Config, weights: str | None) -> list[float]:
    model, masks = pruned()
    changed = merged(config, block(weights=weights) if weights else {})
    with deepspeed.zero.Init(config_dict_or_path=merged(changed, zero(3))):
        partitioned = mlp()
    for path, module in model.named_modules():
        parameters = list(partitioned.get_submodule(path).parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(
            parameters, modifier_rank=0, enabled=bool(parameters)
        ):
            for ours, theirs in zip(parameters, module.parameters(recurse=False), strict=True):
                ours.data.copy_(theirs)
    if weights is None:
        mask_gradients(partitioned, masks)
    return losses_of(start(partitioned, changed))
