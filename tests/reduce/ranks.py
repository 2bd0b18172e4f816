"""Wrapping, stepping and comparing on real ranks, for the tests of this folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import sparse_comm
from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import batch, mlp, random_masks, same_bits

SMALL = 0.002  # bucket_cap_mb that cuts mlp() into several buckets

Gradients = list[Tensor | None]


def compact_mlp(weights: Any = "cached") -> nn.Module:
    return sparse_comm.compact(mlp(), random_masks(mlp()), weights=weights)


def wrapped(model: nn.Module, reduction: Reduction | None, **options: Any) -> DDP:
    """DDP of a copy of the model, with the hook if there is a reduction."""
    ddp = DDP(
        copy.deepcopy(model), **{"gradient_as_bucket_view": True, "bucket_cap_mb": SMALL, **options}
    )
    if reduction is not None:
        ddp.register_comm_hook(reduction, reduce_hook)
    return ddp


def backward(model: nn.Module, rank: int, step: int = 0, scale: float = 1.0) -> Gradients:
    """Gradients of a fresh backward pass on this rank's batch of this step."""
    model.zero_grad()
    (scale * model(batch(1000 * rank + step)[0]).square().sum()).backward()
    return gradients(model)


def gradients(model: nn.Module) -> Gradients:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def own_gradients(model: nn.Module, rank: int, step: int = 0, scale: float = 1.0) -> list[Tensor]:
    """What this rank alone computes."""
    found = backward(copy.deepcopy(model), rank, step, scale)
    return [gradient for gradient in found if gradient is not None]


def same(a: Gradients, b: Gradients) -> bool:
    """Bit for bit, NaNs included."""
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return same_bits(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())


def of_all_ranks(mine: Any) -> list[Any]:
    """What each rank has, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered


def same_on_all_ranks(mine: Gradients) -> bool:
    return all(same(mine, theirs) for theirs in of_all_ranks(mine))


def reduced_by_hand(
    model: nn.Module, rank: int, dtype: torch.dtype | Callable[[Tensor], torch.dtype], **how: Any
) -> list[Tensor]:
    """What two ranks should end with: each divides, rounds and adds in ``dtype``."""
    every = of_all_ranks(own_gradients(model, rank, **how))
    assert len(every) == 2
    reduced = []
    for a, b in zip(*every, strict=True):
        wire = dtype if isinstance(dtype, torch.dtype) else dtype(a)
        reduced.append(((a / 2).to(wire) + (b / 2).to(wire)).to(a.dtype))
    return reduced
