"""Compact models compile into one graph, are never stale, and export."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import sparse_comm
from tests.compact.models import (
    Tied,
    Twice,
    batch,
    mlp,
    pair,
    pruned_are_zero,
    random_masks,
    same_state,
    seeded,
    train,
)

CXX = os.environ.get("CXX", "g++").split()[0]  # as inductor looks for it
needs_cxx = pytest.mark.skipif(
    shutil.which(CXX) is None,
    reason=f"no {CXX} here, and inductor writes C++ for the CPU; eager and aot_eager are tested",
)
both_modes = pytest.mark.parametrize("weights", ["cached", "transient"])
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def compact_model(**options: Any) -> nn.Module:
    return sparse_comm.compact(mlp(), random_masks(mlp()), **options)


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 1e-2, **options)


def whole(model: nn.Module, backend: Any = "aot_eager") -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


# ---------------------------------------------------------------- training


@both_modes
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("model", ["mlp", "tied", "twice"])
def test_one_graph_trains_as_eager_code_does(model, backend, weights):
    make = {"mlp": mlp, "tied": lambda: seeded(Tied), "twice": lambda: seeded(Twice)}[model]
    dense, compact, masks = pair(make, weights=weights)
    expected = train(dense, adamw(dense), masks, 5)
    assert train(compact, adamw(compact), forward=whole(compact, backend), steps=5) == expected
    assert same_state(sparse_comm.dense_state_dict(compact), dense.state_dict())
    assert pruned_are_zero(compact)


@needs_cxx
def test_inductor_trains_as_eager_code_does_within_rounding():
    """Inductor fuses operators and rounds less often."""
    dense, compact, masks = pair(weights="cached")  # transient is below, with what it saves
    expected = train(dense, adamw(dense), masks, 5)
    losses = train(compact, adamw(compact), forward=whole(compact, "inductor"), steps=5)
    assert losses == pytest.approx(expected, rel=1e-5)


@both_modes
def test_autocast_and_compute_dtype_compile_too(weights):
    dense, compact, masks = pair(weights=weights, compute_dtype=torch.bfloat16)
    expected = train(dense, adamw(dense), masks, 3, autocast=True)
    losses = train(compact, adamw(compact), forward=whole(compact), steps=3, autocast=True)
    assert losses == pytest.approx(expected, rel=2**-8)


@both_modes
def test_gradients_are_those_of_eager_code(weights):
    compact = compact_model(weights=weights)
    x, y = batch(0)
    of_input = x.clone().requires_grad_()
    inputs = [of_input, *compact.parameters()]
    expected = torch.autograd.grad(F.cross_entropy(compact(of_input), y), inputs)
    compiled = whole(compact)
    for _ in range(2):
        found = torch.autograd.grad(F.cross_entropy(compiled(of_input), y), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_cxx)])
def test_transient_weights_are_not_saved_for_backward(backend):
    saved = {}
    for weights in ("cached", "transient"):
        torch._dynamo.reset()
        compact = compact_model(weights=weights)
        out = whole(compact, backend)(batch(0)[0].requires_grad_())
        # sizes of what the compiled backward keeps; no activation is as large as a weight
        sizes = [t.numel() for t in out.grad_fn.saved_tensors]
        saved[weights] = [n for n in sizes if n in (33 * 65, 65 * 65)]
        found = torch.autograd.grad(out.sum(), compact.parameters())
        expected = torch.autograd.grad(compact(batch(0)[0]).sum(), compact.parameters())
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert saved["transient"] == []
    assert len(saved["cached"]) == 2  # what the test would see


@both_modes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_around_a_compiled_block(weights, use_reentrant):
    eager = compact_model(weights=weights)
    compact = copy.deepcopy(eager)
    block = whole(compact[:3])
    x, y = batch(0)
    x.requires_grad_()
    for model, run in (
        (eager, lambda: eager(x)),
        (compact, lambda: compact[3:](checkpoint(block, x, use_reentrant=use_reentrant))),
    ):
        optimizer = adamw(model)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(run(), y).backward()
            optimizer.step()
    assert same_state(eager.state_dict(), compact.state_dict())


@both_modes
def test_activation_checkpointing_within_a_compiled_model(weights):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = compact_model(weights=weights)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[3:](checkpoint(self.inner[:3], x, use_reentrant=False))

    model = Checkpointed()
    x, y = batch(0)
    expected = torch.autograd.grad(F.cross_entropy(model.inner(x), y), model.parameters())
    found = torch.autograd.grad(F.cross_entropy(whole(model)(x), y), model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------- never stale


def swapped(model: nn.Module) -> None:
    """As trainers do with averaged weights: other tensors behind the same parameters."""
    for p in model.parameters():
        p.data = p.data * 0.5


def exchanged(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.flip(0))


def unseen(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(0.5)
    sparse_comm.values_changed(model)


def through_the_attribute(model: nn.Module) -> None:
    nn.init.constant_(model[0].weight, 0.01)
    model[2].weight.data.mul_(-1)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "an in-place operator": exchanged,
    "a swap of .data": swapped,
    "a write through .data and values_changed": unseen,
    "nn.init and .data of the dense weight": through_the_attribute,
    "loading a dense state": lambda m: m.load_state_dict(
        {k: v * 0.5 for k, v in sparse_comm.dense_state_dict(m).items()}
    ),
    "loading a compact state": lambda m: m.load_state_dict(
        {k: v if v.dtype == torch.uint8 else v * 0.5 for k, v in m.state_dict().items()}
    ),
    "assigning a state": lambda m: m.load_state_dict(
        {k: v * 0.5 for k, v in sparse_comm.dense_state_dict(m).items()}, assign=True
    ),
    "a fused step": lambda m: train(m, adamw(m, fused=True), steps=1),
    "update_masks": lambda m: sparse_comm.update_masks(m, random_masks(mlp(), seed=9)),
}


@both_modes
@pytest.mark.filterwarnings("ignore:a dense tensor written")
def test_a_compiled_model_sees_every_write(weights):
    compact = compact_model(weights=weights)
    compiled = whole(compact)
    x, _ = batch(0)
    seen = [compiled(x)]
    for name, write in WRITES.items():
        write(compact)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                out = compiled(x)
            expected = sparse_comm.densify(copy.deepcopy(compact))(x)
            assert torch.equal(out, expected), name
        assert not any(torch.equal(out, before) for before in seen), name
        seen.append(out)


def test_a_copy_that_only_ever_ran_compiled_is_not_stale_after_a_fused_step():
    """Fused steps bump no version: values are known by a mark, which a copy needs as well."""
    _, compact, _ = pair(weights="cached")
    copied = copy.deepcopy(compact)
    expected = train(compact, adamw(compact, fused=True), steps=3)
    assert train(copied, adamw(copied, fused=True), forward=whole(copied), steps=3) == expected


@both_modes
def test_compiled_and_eager_calls_may_alternate(weights):
    dense, compact, masks = pair(weights=weights)
    compiled = whole(compact)
    calls = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (compiled if calls % 2 else compact)(x)

    expected = train(dense, adamw(dense), masks, 6)
    assert train(compact, adamw(compact), forward=forward, steps=6) == expected


# ---------------------------------------------------------------- how many graphs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def graphs(weights: str | None, same_nnz: bool) -> int:
    """Graphs made for 12 equal blocks, compiled one by one as is usual for large models."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*[Block() for _ in range(12)])
    if weights is not None:
        masks = {
            name: torch.arange(p.numel()).reshape(p.shape) < 300 + (0 if same_nnz else 7 * i)
            for i, (name, p) in enumerate(model.named_parameters())
            if p.dim() > 1
        }
        sparse_comm.compact(model, masks, weights=weights)  # type: ignore[arg-type]
    x = torch.randn(4, 32, requires_grad=True)
    out = x
    for block in model:
        out = torch.compile(block, backend=counter)(out)
    assert torch.equal(out, model(x))
    found = torch.autograd.grad(out.sum(), model.parameters())
    expected = torch.autograd.grad(model(x).sum(), model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return counter.frame_count


@both_modes
def test_equal_blocks_of_equal_nnz_share_one_graph_as_dense_ones_do(weights):
    assert graphs(None, same_nnz=True) == graphs(weights, same_nnz=True) == 1


@both_modes
def test_blocks_of_different_nnz_share_two_graphs_if_parameters_may_be_dynamic(weights):
    """By default torch takes a parameter's size for fixed: a graph a block, up to its limit."""
    assert graphs(weights, same_nnz=False) == torch._dynamo.config.recompile_limit
    dynamic = {
        "force_parameter_static_shapes": False,
        "force_nn_module_property_static_shapes": False,
    }
    with torch._dynamo.config.patch(dynamic):
        assert graphs(weights, same_nnz=False) == 2


# ---------------------------------------------------------------- export


@both_modes
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_gives_the_same_and_holds_values_only(weights, strict):
    compact = compact_model(weights=weights)
    x, _ = batch(0)
    exported = torch.export.export(compact, (x,), strict=strict)
    assert torch.equal(exported.module()(x), compact(x))
    assert {n: p.shape for n, p in exported.named_parameters()} == {
        n: p.shape for n, p in compact.named_parameters()
    }
    with torch.no_grad():
        for p in compact.parameters():
            p.mul_(2)
    exported = torch.export.export(compact, (x,), strict=strict)
    assert torch.equal(exported.module()(x), compact(x))
