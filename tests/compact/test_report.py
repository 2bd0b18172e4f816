"""``summary`` counts the bytes that exist, and says why a parameter stays dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_comm
from tests.compact.models import Tied, mlp, pair, random_masks, seeded, train


@pytest.mark.parametrize("weights", ["cached", "transient"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_bytes_are_those_of_the_tensors(weights, compute_dtype):
    model = sparse_comm.compact(
        mlp(), random_masks(mlp()), weights=weights, compute_dtype=compute_dtype
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    values = dict(model.named_parameters())
    before = sparse_comm.summary(model, optimizer)
    assert (before.gradient_bytes, before.optimizer_bytes) == (0, 0)
    train(model, optimizer, steps=1, autocast=compute_dtype is not None)
    masks = sparse_comm.masks_of(model)
    found = sparse_comm.summary(model, optimizer)
    assert [row.name for row in found.rows] == list(values)
    for row in found.rows:
        parameter, mask = values[row.name], masks.get(row.name)
        assert row.parameter_bytes == row.gradient_bytes == 4 * parameter.numel()
        assert row.optimizer_bytes == 2 * 4 * parameter.numel() + 4  # two moments and the step
        if mask is None:
            assert (row.shape, row.density, row.nnz) == (tuple(parameter.shape), 1, row.numel)
            assert row.pattern_bytes == row.cache_bytes == 0
            continue
        assert (row.shape, row.nnz, row.numel) == (tuple(mask.shape), mask.sum(), mask.numel())
        pattern = sparse_comm.SparsityPattern(mask)
        assert row.pattern_bytes == pattern.bitmap.nbytes + pattern.offsets.nbytes
        assert row.density == pattern.density
        width = 4 if compute_dtype is None else 2
        assert row.cache_bytes == (width * mask.numel() if weights == "cached" else 0)
    total = sum(p.numel() for p in mlp().parameters())
    assert found.density == sum(p.numel() for p in values.values()) / total
    assert found.optimizer_bytes == sum(
        t.nbytes for state in optimizer.state.values() for t in state.values()
    )
    assert found.total_bytes == sum(
        getattr(found, f"{part}_bytes")
        for part in ("parameter", "gradient", "optimizer", "pattern", "cache")
    )
    assert sparse_comm.summary(model).optimizer_bytes == 0


def test_a_plain_model_is_all_dense():
    found = sparse_comm.summary(mlp())
    assert found.density == 1
    assert found.total_bytes == found.parameter_bytes == sum(p.nbytes for p in mlp().parameters())
    assert sparse_comm.summary(nn.ReLU()).density == 1
    assert "0 parameters" in str(sparse_comm.summary(nn.ReLU()))


def test_a_tied_parameter_counts_once():
    model = sparse_comm.compact(seeded(Tied), random_masks(seeded(Tied)))
    names = [row.name for row in sparse_comm.summary(model).rows]
    assert names == [name for name, _ in seeded(Tied).named_parameters()]


def test_the_table_names_each_parameter_its_shape_density_and_why_it_is_dense():
    model = nn.Sequential(nn.Linear(33, 65), nn.LayerNorm(65), nn.Linear(65, 7))
    model.register_parameter("steps", nn.Parameter(torch.zeros(2).long(), requires_grad=False))
    sparse_comm.compact(model, {"0.weight": torch.arange(65 * 33).reshape(65, 33) % 4 == 0})
    lines = str(sparse_comm.summary(model)).splitlines()
    assert lines[0].split() == [
        "parameter",
        "shape",
        "density",
        "param",
        "grad",
        "optim",
        "pattern",
        "cache",
    ]
    rows = {line.split()[0]: line for line in lines if line and not line.startswith("-")}
    assert "65×33" in rows["0.weight"]
    assert "0.250  cached" in rows["0.weight"]
    assert "2.1 kB" in rows["0.weight"]  # 537 values of 4 bytes
    assert "dense: no mask (bias or norm)" in rows["1.weight"]
    assert rows["2.weight"].split("  ")[-1]
    assert "dense: no mask " in rows["2.weight"]
    assert "(bias or norm)" not in rows["2.weight"]
    assert "dense: torch.int64 cannot be compact" in rows["steps"]
    assert "7 parameters" in lines[-2]
    found = sparse_comm.summary(model)
    assert lines[-1] == f"{found.total_bytes / 1000:.1f} kB of model state in this process"


def test_wrapped_models_are_reported_under_their_names_there():
    _, compact, _ = pair()
    inside, outside = sparse_comm.summary(compact), sparse_comm.summary(nn.Sequential(compact))
    assert [f"0.{row.name}" for row in inside.rows] == [row.name for row in outside.rows]
    assert inside.total_bytes == outside.total_bytes
