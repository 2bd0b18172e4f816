"""A dense weight that is kept while the values change or are replaced gives no wrong result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparse_comm
from tests.compact.uses import MODES, mask_like

pytestmark = MODES


class Product(torch.autograd.Function):
    """x @ w.T, with the weight as it is given saved for backward."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


def compact_linear(weights: str) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(8, 8, bias=False)
    return sparse_comm.compact(module, {"weight": mask_like(module.weight)}, weights=weights)


def other_mask(module: nn.Module) -> dict[str, Tensor]:
    """A mask of as many unpruned entries, elsewhere."""
    return {"weight": sparse_comm.masks_of(module)["weight"].flip(0)}


def test_values_changed_before_a_custom_functions_backward_raise(weights):
    module = compact_linear(weights)
    x = torch.randn(3, 8, requires_grad=True)
    loss = Product.apply(x, module.weight).square().sum()
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match=r"'weight' changed between forward|modified by an in"):
        loss.backward()


def test_masks_updated_before_backward_raise_or_give_the_forwards_gradient(weights):
    module = compact_linear(weights)
    x = torch.randn(3, 8, requires_grad=True)
    twin = copy.deepcopy(module)
    (expected,) = torch.autograd.grad(twin(x).square().sum(), x)
    loss = module(x).square().sum()
    sparse_comm.update_masks(module, other_mask(module))
    if weights == "transient":
        with pytest.raises(RuntimeError, match="run backward first"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    "replace",
    [
        sparse_comm.densify,
        lambda m: sparse_comm.update_masks(m, other_mask(m)),
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    ],
    ids=["densify", "update_masks", "assign=True"],
)
def test_writes_to_a_weight_kept_over_a_replacement_raise(weights, replace):
    module = compact_linear(weights)
    kept = module.weight
    replace(module)
    before = module.weight.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match="take the module's attribute anew"):
        kept.fill_(5)
    assert torch.equal(module.weight, before)


def test_a_parameter_put_back_may_be_written_to_again(weights):
    module = compact_linear(weights)
    first = next(module.parameters())
    module.weight = nn.Parameter(first.detach().clone())
    module.weight = first
    with torch.no_grad():
        module.weight.fill_(5)
    assert (first == 5).all()


def test_a_wholly_pruned_parameter_is_announced(weights):
    module = nn.Linear(8, 8)
    nothing = {"weight": torch.zeros(8, 8, dtype=torch.bool)}
    with pytest.warns(UserWarning, match=r"nothing of 'weight' is unpruned.*scope='layer'"):
        sparse_comm.compact(module, nothing, weights=weights)
