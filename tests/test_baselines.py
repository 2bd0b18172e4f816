"""The baselines that the benchmarks compare with do what their papers, or torch, say."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from scripts.baselines.coo import all_reduce_coo
from scripts.baselines.dense import all_reduce_in_buckets
from scripts.baselines.powersgd import PLAIN_STEPS, bytes_sent, powersgd_ddp
from scripts.baselines.samo import Samo
from tests.launch import run

DENSITY = 0.2
STEPS = 6


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(24, 40, bias=False), nn.Tanh(), nn.Linear(40, 24, bias=False))
    return nn.Sequential(*layers).bfloat16()


def make_masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.rand(p.shape) < DENSITY for name, p in model.named_parameters()}


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step)).bfloat16()
    (model(x) - x).square().mean().backward()


ADAM = partial(torch.optim.AdamW, lr=0.01, foreach=True)


# --- SAMO ----------------------------------------------------------------------------------------


def train_samo(reduce_dtype: torch.dtype | None) -> tuple[nn.Module, Samo]:
    model = make_model()
    samo = Samo(model, make_masks(model), ADAM, reduce_dtype)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        backward(model, step * world_size + rank)
        samo.all_reduce()
        samo.step()
    return model, samo


def train_masked_dense(reduce_dtype: torch.dtype | None) -> nn.Module:
    """What SAMO must equal: fp32 masters of all entries, the pruned ones held at zero."""
    model = make_model()
    masks = make_masks(model)
    masters = {name: (p.detach() * masks[name]).float() for name, p in model.named_parameters()}
    optimizer = ADAM(list(masters.values()))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
                p.grad = None
        backward(model, step * world_size + rank)
        for name, p in model.named_parameters():
            assert p.grad is not None
            gradient = p.grad.to(reduce_dtype or p.dtype)
            dist.all_reduce(gradient)
            masters[name].grad = gradient.float() / world_size * masks[name]
        optimizer.step()
        for name, master in masters.items():
            master.mul_(masks[name])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(masters[name])
    return model


def compare_samo(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> None:
    got, _ = train_samo(reduce_dtype)
    expected = train_masked_dense(reduce_dtype)
    start = make_model()
    masks = make_masks(start)
    for name, p in got.named_parameters():
        assert torch.equal(p, expected.get_parameter(name))
        assert not p[~masks[name]].any()
        assert not torch.equal(p, start.get_parameter(name) * masks[name])  # it has learnt


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_samo_trains_as_masked_dense_with_fp32_masters_bit_for_bit(reduce_dtype):
    run(compare_samo, 2, reduce_dtype)


def state_bytes(rank: int, world_size: int) -> tuple[int, int, int]:
    model, samo = train_samo(None)
    parameters = sum(p.numel() for p in model.parameters())
    unpruned = sum(int(mask.sum()) for mask in make_masks(make_model()).values())
    return samo.state_bytes(), parameters, unpruned


def test_samo_keeps_24f_plus_2_bytes_less_the_temporary_downcast():
    [(held, parameters, unpruned)] = run(state_bytes, 1)
    assert held == 2 * parameters + (24 - 2) * unpruned


def collectives(traced: profile) -> list[str]:
    return [event.name for event in traced.events() if event.name == "c10d::allreduce_"]


def trace_samo(rank: int, world_size: int) -> tuple[int, int, bool]:
    model = make_model()
    samo = Samo(model, make_masks(model), ADAM)
    with profile(activities=[ProfilerActivity.CPU]) as in_backward:
        backward(model, rank)
    freed = all(p.grad is None for p in model.parameters())
    with profile(activities=[ProfilerActivity.CPU]) as after:
        samo.all_reduce()
    return len(collectives(in_backward)), len(collectives(after)), freed


def test_samo_frees_dense_gradients_in_backward_and_then_makes_one_collective_a_layer():
    assert run(trace_samo, 2) == [(0, 2, True)] * 2


# --- torch's own ---------------------------------------------------------------------------------


def sum_coo(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    masks = [torch.rand(6, 9) < DENSITY, torch.rand(50) < DENSITY, torch.zeros(3, dtype=torch.bool)]
    all_ranks = [[torch.randn(mask.shape) for mask in masks] for _ in range(world_size)]
    indices = [mask.flatten().nonzero().flatten() for mask in masks]
    reduced = all_reduce_coo(all_ranks[rank], indices)
    for layer, mask, *gradients in zip(reduced, masks, *all_ranks, strict=True):
        assert layer.is_sparse and layer._nnz() == mask.sum()
        expected = sum(gradients) * mask
        torch.testing.assert_close(layer.to_dense().view(mask.shape), expected)


def test_coo_sums_the_unpruned_entries_over_ranks():
    run(sum_coo, 3)


def sum_buckets(rank: int, world_size: int, dtype: torch.dtype) -> list[float]:
    # A bucket of 100 bytes: several, and a rest.
    flat = torch.arange(130, dtype=dtype) + rank
    all_reduce_in_buckets(flat, bucket_mb=100 / 2**20)
    return flat.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_sum_every_entry_once(dtype):
    expected = [2 * entry + 1.0 for entry in range(130)]  # exact in bf16, too
    assert run(sum_buckets, 2, dtype) == [torch.tensor(expected, dtype=dtype).tolist()] * 2


def powersgd_gradients(rank: int, world_size: int, samples: int) -> tuple[list[float], int]:
    """How far from the exact average the gradient of each step is; a gradient has that rank."""
    torch.manual_seed(0)
    model = nn.Linear(32, 48, bias=False)
    payload = bytes_sent(model, rank=4)
    ddp = powersgd_ddp(model, rank=4)
    x = torch.randn(world_size, samples, 32)
    distances = []
    for _ in range(PLAIN_STEPS + 1):
        ddp.zero_grad()
        ddp(x[rank]).square().sum().backward()
        exact = sum(2 * (model(part).T @ part) for part in x) / world_size
        assert model.weight.grad is not None
        distances.append(float((model.weight.grad - exact).norm() / exact.norm()))
    return distances, payload


def test_powersgd_is_exact_at_first_and_for_gradients_of_its_rank():
    for distances, payload in run(powersgd_gradients, 2, 2):  # two ranks' samples: rank 4
        assert max(distances) < 1e-5
        assert payload == 4 * 4 * (32 + 48)


def test_powersgd_loses_of_gradients_of_higher_rank():
    for distances, _ in run(powersgd_gradients, 2, 64):
        *plain, compressed = distances
        assert max(plain) < 1e-5 < 0.1 < compressed < 1


def test_powersgd_sends_small_parameters_as_they_are():
    assert bytes_sent(nn.Linear(5, 3), rank=4) == 4 * (5 * 3 + 3)
