"""What is assigned to ``module.weight`` or its ``.data`` is packed or tied, or it raises."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparse_comm
from tests.compact.uses import (
    MODES,
    linear,
    mask_like,
    noise,
    pair,
    refused,
    same,
)

pytestmark = MODES


# ---------------------------------------------------------------- .data


def test_data_assignment_takes_effect(weights):
    both = linear(weights)

    def assign(module: nn.Module) -> None:
        module.weight.data = noise(5, 6, seed=3)
        module.weight.data += 1
        module.weight.data[2] *= 2
        module.weight.data = module.weight.data * 3

    both.use(assign)
    both.check()


def test_data_assignment_of_a_wrong_shape_raises(weights):
    both = linear(weights)
    with refused(both, ValueError, "'weight'", "(6, 5)", "(5, 6)", "sparse_comm.densify(model)"):
        both.compact.weight.data = torch.ones(6, 5)


@pytest.mark.parametrize("how", ["data", "parameter"])
def test_an_assigned_tensor_brings_its_dtype(weights, how):
    both = linear(weights)

    def halve(module: nn.Module) -> None:  # as the old ways to cast a model layer by layer
        for name in ("weight", "bias"):
            parameter = getattr(module, name)
            if how == "data":
                parameter.data = parameter.data.half()
            else:
                setattr(module, name, nn.Parameter(parameter.detach().half()))

    both.use(halve)
    assert both.values().dtype == both.compact.weight.dtype == torch.float16
    both.check(noise(3, 6).half())


def test_an_assigned_tensor_leaves_the_values_dtype_where_compute_dtype_is_set(weights):
    both = linear(weights, compute_dtype=torch.bfloat16)
    both.compact.weight.data = both.compact.weight.data * 2
    assert both.values().dtype == torch.float32
    same(both.compact.weight, (both.dense.weight * 2).bfloat16())


def test_an_assigned_tensor_brings_its_layout(weights):
    both = pair(lambda: nn.Conv2d(4, 8, 3), weights, noise(2, 4, 5, 5))
    both.use(lambda m: nn.utils.convert_conv2d_weight_memory_format(m, torch.channels_last))
    assert both.compact.weight.is_contiguous(memory_format=torch.channels_last)
    both.check()
    both.use(lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach().contiguous())))
    assert both.compact.weight.is_contiguous()
    both.check()


# ---------------------------------------------------------------- parameters


def test_assigning_a_dense_parameter_packs_it(weights):
    both = linear(weights)
    values = both.values()

    def assign(module: nn.Module) -> None:
        module.weight = nn.Parameter(noise(5, 6, seed=3))

    both.use(lambda m: m(noise(3, 6)).sum().backward())
    both.use(assign)
    assert both.values() is values  # so optimizers go on with it
    assert both.compact.weight.grad is None
    both.check()


def test_assigning_a_parameter_brings_its_gradient_and_notes(weights):
    both = linear(weights)

    def assign(module: nn.Module) -> None:
        new = nn.Parameter(noise(5, 6, seed=3))
        new.grad = noise(5, 6)
        new.is_expert = True
        module.weight = new

    both.use(assign)
    both.check_gradients()
    assert both.compact.weight.is_expert
    both.check()
    assert optimizer_steps(both.compact)


def test_the_parameter_from_before_compact_can_be_assigned_again(weights):
    module = nn.Linear(6, 5)
    before = module.weight
    sparse_comm.compact(module, {"weight": mask_like(before)}, weights=weights)
    module.weight = before
    same(module.weight, before * mask_like(before))
    assert optimizer_steps(module)


def optimizer_steps(module: nn.Module) -> bool:
    before = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(noise(3, 6)).sum().backward()
    optimizer.step()
    return not torch.equal(before, module.weight)


def test_assigning_a_frozen_parameter_freezes_the_values(weights):
    both = linear(weights)

    def assign(module: nn.Module) -> None:
        module.weight = nn.Parameter(noise(5, 6, seed=3), requires_grad=False)

    both.use(assign)
    assert not both.values().requires_grad
    both.check()


def test_assigning_a_parameter_of_the_values_shape_replaces_them(weights):
    both = linear(weights)
    new = nn.Parameter(noise(int(both.masks["weight"].sum())))
    both.compact.weight = new
    assert both.values() is new
    with torch.no_grad():
        both.dense.weight[both.masks["weight"]] = new
    both.check()


def test_a_parameter_assigned_to_a_meta_module_makes_it_real(weights):
    with torch.device("meta"):
        module = nn.Linear(6, 5, bias=False)
    mask = mask_like(noise(5, 6))
    sparse_comm.compact(module, {"weight": mask}, weights=weights)
    module.weight = nn.Parameter(noise(5, 6))
    same(module(noise(3, 6)), noise(3, 6) @ (noise(5, 6) * mask).t())
    module(noise(3, 6)).sum().backward()
    assert module.weight.grad.shape == (5, 6)


def test_assigning_a_parameter_of_a_wrong_shape_raises(weights):
    both = linear(weights)
    with refused(both, ValueError, "'weight'", "(6, 5)", "(5, 6)"):
        both.compact.weight = nn.Parameter(torch.ones(6, 5))
    with refused(both, TypeError, "weight"):
        both.compact.weight = torch.ones(5, 6)
    with refused(both, TypeError, "weight"):
        both.compact.weight = both.compact.weight.data
    with refused(both, (ValueError, TypeError), "'weight'"):
        both.compact.weight = nn.Parameter(torch.ones(5, 6).to_sparse())


def test_assigning_none_takes_the_parameter_away(weights):
    both = pair(lambda: nn.LayerNorm(6), weights, noise(3, 6), masks={"weight": noise(6) > 0})
    both.compact.weight = both.dense.weight = None
    both.masks.clear()
    assert not sparse_comm.is_compact(both.compact)
    both.check()


def test_deleting_the_parameter_raises(weights):
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "sparse_comm.densify(model)"):
        del both.compact.weight


# ---------------------------------------------------------------- ties


def test_assigning_a_compact_weight_to_a_compact_one_ties_them(weights):
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        nn.init.normal_(model[1].weight)
        return model

    both = pair(make, weights, noise(3, 6))
    for module in (both.compact, both.dense):
        module[0].weight = module[1].weight
    both.masks["0.weight"] = both.masks["1.weight"]
    assert both.compact[0]._parameters["weight"] is both.compact[1]._parameters["weight"]
    assert len(list(both.compact.parameters())) == 3
    both.check()
    both.use(lambda m: m[0].weight.data.mul_(2))
    both.check()


def test_assigning_a_weight_to_itself_changes_nothing(weights):
    both = linear(weights)
    values = both.values()
    both.compact.weight = both.compact.weight
    assert both.values() is values
    both.check()


def test_tying_compact_weights_of_different_shapes_raises(weights):
    both, other = linear(weights), pair(lambda: nn.Linear(5, 6), weights, noise(3, 5))
    with refused([both, other], ValueError, "'weight'", "(5, 6)", "(6, 5)"):
        both.compact.weight = other.compact.weight


@pytest.mark.parametrize("grad", [True, False])
def test_assigning_a_compact_weight_to_a_plain_module_raises(weights, grad):
    both, plain = linear(weights), nn.Linear(6, 5)
    weight = plain.weight
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as caught:
        plain.weight = both.compact.weight
    assert "before sparse_comm.compact, or after sparse_comm.densify" in str(caught.value)
    assert plain.weight is weight
    both.check()


def test_assigning_the_parameter_of_a_plain_module_copies_it_without_a_tie(weights):
    """As any dense tensor that is assigned: training the plain one does not reach the values."""
    both, plain = linear(weights), nn.Linear(6, 5)
    both.compact.weight = plain.weight
    both.use(lambda m: m.weight.data.copy_(plain.weight.data))
    both.check()
    with torch.no_grad():
        plain.weight.zero_()
    both.check()


def test_tied_embedding_and_linear_stay_tied(weights):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).tanh())

    both = pair(Tied, weights, torch.tensor([[0, 3, 6]]))
    both.masks["head.weight"] = both.masks["embedding.weight"]
    both.check()
    assert [n for n, _ in both.compact.named_parameters()] == ["embedding.weight"]
    both.use(lambda m: nn.init.normal_(m.head.weight))
    both.check()
    twin = copy.deepcopy(both.compact)
    assert twin.head._parameters["weight"] is twin.embedding._parameters["weight"]
    sparse_comm.densify(twin)
    assert twin.head.weight is twin.embedding.weight
