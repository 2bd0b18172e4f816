"""``GradientBuckets`` averages what DDP would, once a step of several backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_comm.reduce import GradientBuckets, Reduction, Share
from tests.compact.models import batch, mlp
from tests.integrations.cases import Cases, case, passed

CASES: Cases = {}


def shares_of(model: nn.Module, group: Any = None, divisor: int | None = None) -> list[Share]:
    divisor = divisor or dist.get_world_size()
    return [Share(name, p, group, divisor) for name, p in model.named_parameters()]


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(seed)
    return nn.functional.cross_entropy(model(x), y)


def expected_gradients(world_size: int, passes: int) -> list[Tensor]:
    model = mlp()
    for rank in range(world_size):
        for number in range(passes):
            loss_of(model, 10 * rank + number).backward()
    return [p.grad / world_size for p in model.parameters()]


@case(CASES)
def several_passes_are_averaged_once(rank: int, world_size: int) -> None:
    for overlap in (True, False):
        for cap in (1e-6, 100.0):
            model = mlp()
            reduction = Reduction(None, stats=True)
            buckets = GradientBuckets(shares_of(model), reduction, cap, overlap)
            for _ in range(3):
                model.zero_grad()
                for number in range(3):
                    with buckets.backward(last=number == 2):
                        loss_of(model, 10 * rank + number).backward()
                buckets.wait()
                for p, expected in zip(
                    model.parameters(), expected_gradients(world_size, 3), strict=True
                ):
                    assert torch.allclose(p.grad, expected, atol=1e-6)
            count = len(list(model.parameters()))
            stats = reduction.stats()
            assert stats["steps"] == 3
            assert stats["collectives"] == (1 if cap == 100.0 else count)
            assert stats["bytes_sent"] == 4 * sum(p.numel() + 1 for p in model.parameters())


@case(CASES)
def overlap_reduces_before_backward_ends(rank: int, world_size: int) -> None:
    model = mlp()
    buckets = GradientBuckets(shares_of(model), Reduction(None), 1e-6)
    launched: list[int] = []
    for number in range(2):
        with buckets.backward(last=True):
            loss_of(model, number).backward()
            launched.append(buckets._next)
        buckets.wait()
    # how often gradients grow is known after the first pass only
    assert launched == [0, len(list(model.parameters()))]


@case(CASES)
def gradients_round_once_to_the_dtype_in_which_they_travel(rank: int, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp()
        buckets = GradientBuckets(shares_of(model), Reduction(dtype), 100.0)
        with buckets.backward(last=True):
            loss_of(model, rank).backward()
            own = [(p.grad / world_size).to(dtype) for p in model.parameters()]
        buckets.wait()
        for p, mine in zip(model.parameters(), own, strict=True):
            parts = [torch.empty_like(mine) for _ in range(world_size)]
            dist.all_gather(parts, mine)
            total = sum(part.float() for part in parts)
            assert (p.grad - total).abs().max() <= 2**-7 * total.abs().max()
            assert torch.equal(p.grad, p.grad.to(dtype).float())


@case(CASES)
def ranks_alone_divide_and_send_nothing(rank: int, world_size: int) -> None:
    group, _ = dist.new_subgroups(1)
    model = mlp()
    reduction = Reduction(torch.bfloat16, stats=True)
    buckets = GradientBuckets(shares_of(model, group, divisor=4), reduction)
    with buckets.backward(last=True):
        loss_of(model, rank).backward()
        own = [p.grad.clone() for p in model.parameters()]
    buckets.wait()
    assert all(torch.equal(p.grad, g / 4) for p, g in zip(model.parameters(), own, strict=True))
    assert reduction.stats()["bytes_sent"] == 0


@case(CASES)
def hooks_go_with_the_buckets(rank: int, world_size: int) -> None:
    model = mlp()
    buckets = GradientBuckets(shares_of(model), Reduction(None))
    del buckets
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss_of(model, 0).backward()


@case(CASES)
def what_makes_no_sense_is_refused(rank: int, world_size: int) -> None:
    shares = shares_of(mlp())
    with pytest.raises(ValueError, match="must be more than 0, got 0"):
        GradientBuckets(shares, Reduction(None), 0)
    with pytest.raises(ValueError, match="given twice"):
        GradientBuckets([*shares, shares[0]], Reduction(None))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_buckets(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
