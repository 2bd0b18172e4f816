"""Tools that take modules or their weights apart work, or raise and say what to do instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import sparse_comm
from tests.compact.uses import (
    MODES,
    linear,
    mask_like,
    mlp,
    noise,
    pair,
    refused,
    same,
)
from tests.launch import run

pytestmark = MODES


# ---------------------------------------------------------------- what replaces a weight


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


ON_TOP = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the old spectral_norm": torch.nn.utils.spectral_norm,
    "prune.l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "prune.ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "prune.custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(5, 6)),
}


@pytest.mark.parametrize("tool", ON_TOP)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_replaces_a_compact_weight_raises(weights, tool):
    both = linear(weights)
    names = [name for name, _ in both.compact.named_parameters()]
    with refused(both, (RuntimeError, ValueError), "'weight'", "sparse_comm.densify"):
        ON_TOP[tool](both.compact)
    assert [name for name, _ in both.compact.named_parameters()] == names
    assert type(both.compact).__name__ == "Linear"
    assert not both.compact._forward_pre_hooks


def test_global_pruning_on_top_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    with refused(both, (RuntimeError, ValueError), "'0.weight'", "sparse_comm.densify"):
        prune.global_unstructured(
            [(both.compact[0], "weight"), (both.compact[2], "weight")],
            prune.L1Unstructured,
            amount=0.5,
        )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: nn.LSTM(4, 3)])
def test_the_old_weight_norm_raises_though_it_takes_the_weight_away(weights, make):
    module = make()
    name = next(iter(module._parameters))
    sparse_comm.compact(module, {name: mask_like(module._parameters[name])}, weights=weights)
    with pytest.raises(RuntimeError, match=rf"'{name}'.*densify\(model\) before"):
        torch.nn.utils.weight_norm(module, name)


def test_parametrizations_below_are_refused(weights):
    module = parametrizations.weight_norm(nn.Linear(6, 5))
    name = "parametrizations.weight.original1"
    with pytest.raises(ValueError, match="remove_parametrizations"):
        sparse_comm.compact(module, {name: torch.rand(5, 6) < 0.5}, weights=weights)
    assert module(noise(1, 6)).shape == (1, 5)


def test_modules_with_any_parametrization_are_refused(weights):
    """Removing the parametrization later would take the wrong class away."""
    module = parametrize.register_parametrization(nn.Linear(6, 5), "bias", Double())
    with pytest.raises(ValueError, match="remove_parametrizations"):
        sparse_comm.compact(module, {"weight": mask_like(noise(5, 6))}, weights=weights)
    parametrize.remove_parametrizations(module, "bias")
    assert type(module) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_below_works(weights):
    both = pair(
        lambda: torch.nn.utils.weight_norm(nn.Linear(6, 5)),
        weights,
        noise(3, 6),
        masks={"weight_v": mask_like(noise(5, 6))},
    )
    both.check()


def test_torch_pruning_below_works(weights):
    def make() -> nn.Module:
        return prune.custom_from_mask(nn.Linear(6, 5), "weight", mask_like(noise(5, 6)))

    masks = {"weight_orig": mask_like(noise(5, 6))}
    both = pair(make, weights, noise(3, 6), masks=masks)
    both.check()
    both.use(lambda m: m.weight_orig.data.mul_(2))
    both.check()


def test_other_parameters_of_a_compact_module_can_be_parametrized(weights):
    both = linear(weights)
    both.each(lambda m: parametrize.register_parametrization(m, "bias", Double()))
    both.check()
    both.compact = copy.deepcopy(both.compact)
    both.check()
    sparse_comm.densify(both.compact)
    same(*both.each(lambda m: m(noise(3, 6))))
    both.each(lambda m: parametrize.remove_parametrizations(m, "bias"))
    assert type(both.compact) is nn.Linear
    same(*both.each(lambda m: m(noise(3, 6))))


def test_parametrizations_of_other_parameters_can_be_removed(weights):
    both = linear(weights)
    both.each(lambda m: parametrize.register_parametrization(m, "bias", Double()))
    both.each(lambda m: parametrize.remove_parametrizations(m, "bias"))
    both.check()
    sparse_comm.densify(both.compact)
    assert type(both.compact) is nn.Linear


# ---------------------------------------------------------------- what replaces a module


def test_sync_batch_norm_conversion_of_masked_norms_raises(weights):
    def make() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    both = pair(make, weights, noise(2, 4, 2, 2), masks={"1.weight": mask_like(noise(4))})
    with refused(both, RuntimeError, "'1.weight'", "before sparse_comm.compact"):
        nn.SyncBatchNorm.convert_sync_batchnorm(both.compact)


def test_sync_batch_norm_conversion_of_other_norms_works(weights):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    both = pair(make, weights, noise(2, 3, 5, 5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(both.compact)
    assert type(converted[1]) is nn.SyncBatchNorm
    both.compact = converted.eval()
    both.dense.eval()
    both.check()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_dynamic_quantization_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    for spec in ({nn.Linear}, {"0": torch.ao.quantization.default_dynamic_qconfig}, None):
        with refused(both, RuntimeError, "quantization", "sparse_comm.densify(model)"):
            torch.ao.quantization.quantize_dynamic(both.compact, spec)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_static_quantization_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    with refused(both, RuntimeError, "quantization", "sparse_comm.densify(model)"):
        both.compact.qconfig = torch.ao.quantization.get_default_qconfig()
        torch.ao.quantization.prepare(both.compact)


def test_data_parallel_replication_raises(weights):
    """It is what DataParallel does with each module, on two GPUs and more."""
    both = pair(mlp, weights, noise(3, 6))
    for module in (both.compact, both.compact[0]):
        with refused(both, RuntimeError, "DistributedDataParallel"):
            module._replicate_for_data_parallel()


def plans_after_compact(rank: int, world_size: int, weights: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world_size,))
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "out of the plan", "fully_shard"):
        parallelize_module(both.compact, mesh, ColwiseParallel())
    with refused(both, RuntimeError, "non-leaf"):  # PyTorch's own words, before ours
        parallelize_module(both.compact, mesh, RowwiseParallel())
    both = pair(lambda: nn.Embedding(9, 4), weights, torch.tensor([0, 8]))
    with refused(both, RuntimeError, "'weight'", "out of the plan", "fully_shard"):
        parallelize_module(both.compact, mesh, RowwiseParallel())
    with refused(both, IndexError, "Dimension out of range"):
        parallelize_module(both.compact, mesh, ColwiseParallel())
    both = pair(mlp, weights, noise(3, 6), masks={"0.weight": mask_like(noise(8, 6))})
    parallelize_module(both.compact, mesh, {"2": ColwiseParallel()})
    same(*both.each(lambda m: m(noise(3, 6))))
    assert both.values("0.weight").dim() == 1


def test_tensor_parallel_plans_for_compact_modules_raise_and_for_others_work(weights):
    run(plans_after_compact, 1, weights)


# ---------------------------------------------------------------- scripting, tracing, export


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_script_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    for module in (both.compact, both.compact[0], nn.Sequential(both.compact)):
        with refused(both, RuntimeError, "torch.jit.trace", "sparse_comm.densify(model)"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace_works_and_follows_the_values(weights):
    both = pair(mlp, weights, noise(3, 6))
    traced = torch.jit.trace(both.compact, both.inputs)
    same(traced(*both.inputs), both.dense(*both.inputs))
    same(traced(noise(7, 6)), both.dense(noise(7, 6)))
    both.use(lambda m: m[0].weight.data.mul_(2))
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.check()


@pytest.mark.parametrize("strict", [True, False])
def test_export_works_and_follows_the_values(weights, strict):
    both = pair(mlp, weights, noise(3, 6))
    program = torch.export.export(both.compact, both.inputs, strict=strict)
    same(program.module()(*both.inputs), both.dense(*both.inputs))
    assert sorted(program.state_dict) == sorted(both.dense.state_dict())
    assert program.state_dict["0.weight"].shape == both.values("0.weight").shape
    both.check()


def test_fx_tracing_works(weights):
    both = pair(mlp, weights, noise(3, 6))
    traced = torch.fx.symbolic_trace(both.compact)
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.use(lambda m: m[0].weight.data.mul_(2))
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.check()


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_fx_tracing_through_a_bare_parameter_raises(weights):
    both = pair(Bare, weights, noise(3, 6))
    with refused(both, NameError, "parameter is not a member of this module"):
        torch.fx.symbolic_trace(both.compact)
