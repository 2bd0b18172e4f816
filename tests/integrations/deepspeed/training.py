"""The same training by a dense DeepSpeed engine, masked, and by one with compact parameters.

The dense side masks its gradients by hooks: weights that start at zero, get zero gradients and
decay towards zero stay there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sparse_comm.integrations import deepspeed as sparse_deepspeed
from torch import Tensor, nn

from sparse_comm.mask_sync import on_all_ranks
from tests.compact.models import random_masks, zero_pruned_

Config = dict[str, Any]
Masks = dict[str, Tensor]

WIDTH = 32
CLASSES = 16
BATCH = 16
# Of its inference kernel over shared memory, which DeepSpeed compiles as it starts: 24 seconds.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

BASE: Config = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 0.0,  # DeepSpeed's default is 1
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}


def mlp() -> nn.Module:
    """Of sizes that are multiples of 16, as real models are.

    Matrix products round differently for weights that stand at odd addresses in ZeRO's buffers.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 64),
        nn.GELU(),
        nn.Linear(64, 64),
        nn.LayerNorm(64),
        nn.Linear(64, CLASSES),
    )


def merged(config: Mapping[str, Any], *changes: Mapping[str, Any]) -> Config:
    """``config`` with changes put in, block by block; None takes a key out."""
    result = copy.deepcopy(dict(config))
    for change in changes:
        for key, value in change.items():
            if value is None:
                result.pop(key, None)
            elif isinstance(value, Mapping):
                result[key] = merged(result.get(key, {}), value)
            else:
                result[key] = copy.deepcopy(value)
    return result


def zero(stage: int, **options: Any) -> Config:
    """The config of a ZeRO stage; small parameters are partitioned as well as large ones."""
    persist = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **persist, **options}}


def block(masks: str = "from_zeros", **rest: Any) -> Config:
    return {"sparse_comm": {"masks": masks, **rest}}


def pruned(make: Callable[[], nn.Module] = mlp) -> tuple[nn.Module, Masks]:
    """A dense model with zeros, and their masks."""
    model = make()
    masks = random_masks(model)
    zero_pruned_(model, masks)
    return model, masks


def mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """From now on, pruned entries get no gradient."""
    for name, parameter in model.named_parameters():
        if name in masks and parameter.requires_grad:
            parameter.register_hook(lambda grad, mask=masks[name]: grad * mask)
    return model


def start(model: nn.Module, config: Config, **arguments: Any) -> Any:
    """The engine of ``initialize``."""
    arguments.setdefault("model_parameters", [p for p in model.parameters() if p.requires_grad])
    return sparse_deepspeed.initialize(model=model, config=config, **arguments)[0]


def engine_of(
    config: Config,
    weights: str | None,
    make: Callable[[], nn.Module] = mlp,
    arguments: Callable[[nn.Module], dict[str, Any]] = lambda model: {},
) -> Any:
    """A masked dense engine (``weights=None``), or a compact one, of the same model each time.

    ``arguments``: more of those of ``initialize``, made from the dense model.
    """
    model, masks = pruned(make)
    if weights is None:
        return start(mask_gradients(model, masks), merged(config), **arguments(model))
    return start(model, merged(config, block(weights=weights)), **arguments(model))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of one rank, and which of the first is the largest, to be learnt."""
    generator = torch.Generator().manual_seed(1000 * (dist.get_rank() + 1) + seed)
    x = torch.rand(BATCH, WIDTH, generator=generator) * 2 - 1
    return x, x[:, :CLASSES].argmax(1)


def batches(first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    seed = first
    while True:
        yield batch(seed)
        seed += 1


def loss_of(engine: Any, seed: int) -> Tensor:
    x, y = batch(seed)
    return F.cross_entropy(engine(x.to(_input_dtype(engine))).float(), y)


def train(engine: Any, steps: int = 6, accumulate: int = 1, first: int = 0) -> list[float]:
    """Losses of some steps, and one after the last."""
    losses = []
    for seed in range(first, first + steps * accumulate):
        loss = loss_of(engine, seed)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    with torch.no_grad():
        losses.append(loss_of(engine, first + steps * accumulate).item())
    engine.train()
    return losses


def on_first(function: Callable[[], Any]) -> None:
    """Run something on rank 0; the others wait, and fail with it."""
    on_all_ranks(lambda: function() if dist.get_rank() == 0 else None)


def losses_of(engine: Any, **options: Any) -> list[float]:
    """``train``, after which the engine is destroyed."""
    losses = train(engine, **options)
    engine.destroy()
    return losses


def dense_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all weights, whole and dense, on every rank. A collective under ZeRO 3."""
    found = {}
    for path, module in engine.module.named_modules():
        parameters = list(module.parameters(recurse=False))
        managed = [p for p in parameters if hasattr(p, "ds_id")]
        with deepspeed.zero.GatheredParameters(managed, enabled=bool(managed)):
            for name in module._parameters:
                if module._parameters[name] is not None:
                    value = getattr(module, name).detach()
                    found[f"{path}.{name}" if path else name] = torch.clone(value)
    return found


def _input_dtype(engine: Any) -> torch.dtype:
    if engine.bfloat16_enabled():
        return torch.bfloat16
    return torch.float16 if engine.fp16_enabled() else torch.float32
