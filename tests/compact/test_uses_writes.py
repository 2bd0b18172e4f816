"""A write to ``module.weight`` reaches the values, or raises and changes nothing."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import sparse_comm
from sparse_comm.compact import link
from tests.compact.uses import (
    MODES,
    Pair,
    linear,
    noise,
    pair,
    refused,
    same,
)

pytestmark = MODES


# ---------------------------------------------------------------- initialisers


INITIALISERS = [
    lambda w: nn.init.uniform_(w),
    lambda w: nn.init.normal_(w, std=2.0),
    lambda w: nn.init.trunc_normal_(w),
    lambda w: nn.init.constant_(w, 3.0),
    lambda w: nn.init.ones_(w),
    lambda w: nn.init.zeros_(w),
    lambda w: nn.init.xavier_uniform_(w),
    lambda w: nn.init.xavier_normal_(w),
    lambda w: nn.init.kaiming_uniform_(w, a=math.sqrt(5)),
    lambda w: nn.init.kaiming_normal_(w),
    lambda w: nn.init.orthogonal_(w),
    lambda w: nn.init.eye_(w),
    lambda w: nn.init.sparse_(w, sparsity=0.3),
]


@pytest.mark.parametrize("init", INITIALISERS)
def test_initialisers_take_effect(weights, init):
    both = linear(weights)
    both.use(lambda m: init(m.weight))
    both.check()


@pytest.mark.parametrize("backend", [None, "reference"])
def test_expand_into_the_weight_takes_effect(weights, backend):
    """The view's address is that of a copy; the native back-end would write there."""
    both = linear(weights)
    pattern = sparse_comm.SparsityPattern(both.masks["weight"])
    values = noise(pattern.nnz)
    sparse_comm.kernels.use_backend(backend)
    try:
        both.use(lambda m: sparse_comm.kernels.expand(values, pattern, out=m.weight))
    finally:
        sparse_comm.kernels.use_backend(None)
    both.check()


@pytest.mark.parametrize("groups", [1, 2])
def test_dirac_takes_effect(weights, groups):
    both = pair(lambda: nn.Conv2d(4, 4, 3, groups=groups), weights, noise(2, 4, 5, 5))
    both.use(lambda m: nn.init.dirac_(m.weight, groups))
    both.check()


@pytest.mark.parametrize(
    "make, x",
    [
        (lambda: nn.Linear(6, 5), noise(3, 6)),
        (lambda: nn.Conv2d(2, 3, 3), noise(1, 2, 5, 5)),
        (lambda: nn.Embedding(9, 4, padding_idx=2), torch.tensor([0, 2, 8])),
        (lambda: nn.Bilinear(3, 4, 2), None),
    ],
)
def test_reset_parameters_takes_effect(weights, make, x):
    both = pair(make, weights, *([x] if x is not None else [noise(5, 3), noise(5, 4)]))
    both.use(lambda m: m.reset_parameters())
    both.check()


def test_reset_parameters_of_rnns_takes_effect(weights):
    """They draw for each tensor of parameters(), so for the values alone: other random numbers."""
    both = pair(lambda: nn.GRU(4, 30), weights, noise(2, 1, 4))
    before = both.values("weight_hh_l0").detach().clone()
    both.compact.reset_parameters()
    after = both.values("weight_hh_l0").detach()
    assert not (after == before).any()
    assert after.abs().max() <= 30**-0.5
    assert abs(after.std() - (1 / 3 / 30) ** 0.5) < 0.01
    both.dense.load_state_dict(sparse_comm.dense_state_dict(both.compact))
    both.check()


def test_model_apply_takes_effect(weights):
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.constant_(module.bias, 0.1)

    both = pair(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), weights, noise(3, 6))
    both.use(lambda m: m.apply(init))
    both.check()


# ---------------------------------------------------------------- .data, and under no_grad


WRITES = {
    "copy": lambda w: w.copy_(noise(5, 6, seed=3)),
    "fill": lambda w: w.fill_(2.0),
    "row": lambda w: w.__setitem__(0, 1.0),
    "block": lambda w: w.__setitem__((slice(1, 3), slice(2, 4)), noise(2, 2)),
    "mask": lambda w: w.__setitem__(w < 0, 0.5),
    "slice": lambda w: w[1, 2:4].mul_(3),
    "flat": lambda w: w.view(-1)[7:9].fill_(9.0),
    "transpose": lambda w: w.t().copy_(noise(6, 5)),
    "chunk": lambda w: w.chunk(2)[0].mul_(2),
    "unbind": lambda w: w.unbind(0)[1].add_(1),
    "iteration": lambda w: [row.mul_(i) for i, row in enumerate(w)],
    "add": lambda w: w.__iadd__(1),
    "mul": lambda w: w.mul_(0.5).add_(3),
    "out": lambda w: torch.mul(w, 2, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "clamp": lambda w: w.clamp_(-0.1, 0.1),
    "masked_fill": lambda w: w.masked_fill_(w > 0, 7.0),
    "scatter": lambda w: w.scatter_(0, torch.zeros(1, 6, dtype=torch.long), 1.0),
    "index_copy": lambda w: w.index_copy_(0, torch.tensor([1]), noise(1, 6)),
    "normal": lambda w: w.normal_(),
    "same twice": lambda w: torch.add(w, w, out=w),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_through_data_take_effect(weights, write):
    both = linear(weights)
    both.use(lambda m: WRITES[write](m.weight.data))
    both.check()


@pytest.mark.parametrize("write", WRITES)
def test_writes_under_no_grad_take_effect(weights, write):
    both = linear(weights)
    with torch.no_grad():
        both.use(lambda m: WRITES[write](m.weight))
    both.check()


@pytest.mark.parametrize("write", ["copy", "row", "slice", "add", "out", "normal"])
def test_writes_under_inference_mode_take_effect(weights, write):
    both = linear(weights)
    with torch.inference_mode():
        both.use(lambda m: WRITES[write](m.weight))
    both.check()


@pytest.mark.parametrize("write", ["copy", "fill", "row", "block", "slice", "add", "mul", "normal"])
def test_writes_while_gradients_are_recorded_raise_and_change_nothing(weights, write):
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "torch.no_grad()"):
        WRITES[write](both.compact.weight)


def test_writes_of_a_tensor_with_history_to_frozen_weights_raise(weights):
    both = linear(weights)
    both.use(lambda m: m.requires_grad_(False))
    with refused(both, RuntimeError, "torch.no_grad()"):
        both.compact.weight.mul_(torch.ones(6, requires_grad=True))
    both.use(lambda m: m.weight.mul_(2))  # and a plain write is fine, as for any frozen parameter
    both.check()


def test_data_of_another_parameter_can_be_copied(weights):
    both, other = linear(weights), linear(weights)
    other.use(lambda m: m.weight.data.mul_(2))
    both.use(lambda m: m.weight.data.copy_(other.compact.weight.data))
    both.use(lambda m: m.bias.data.copy_(other.compact.bias.data))
    both.check()


def test_what_a_write_drops_is_said_once(weights, monkeypatch):
    monkeypatch.setattr(link, "_warned_dropped", False)
    both = linear(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both.use(lambda m: m.weight.data.copy_(m.weight.detach() * 2))
    with pytest.warns(UserWarning, match="'weight' has non-zero entries where it is pruned"):
        both.use(lambda m: m.weight.data.fill_(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both.use(lambda m: m.weight.data.fill_(2))
    both.check()


def test_writes_to_a_bf16_weight_leave_other_fp32_values_as_they_were(weights):
    both = linear(weights, compute_dtype=torch.bfloat16)
    before = both.values().detach().clone()
    with torch.no_grad():
        both.compact.weight[0, 0] = 2.0
        both.compact.weight.data[1].mul_(1)
    assert both.values().dtype == torch.float32
    assert both.values()[0] == 2
    same(both.values()[1:], before[1:])


def test_a_mask_of_one_entry_takes_writes(weights):
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[2, 3] = True
    both = linear(weights, masks={"weight": mask})
    both.use(lambda m: m.weight.data.fill_(4))
    assert both.values().tolist() == [4]
    both.check()


# ---------------------------------------------------------------- ways around torch's operators


def test_numpy_gives_a_read_only_array(weights):
    both = linear(weights)
    array = both.compact.weight.detach().numpy()
    same(torch.tensor(array), both.dense.weight)
    with refused(both, ValueError, "read-only"):
        array[0] = 1
    with refused(both, ValueError, "read-only"):
        both.compact.weight.data.numpy()[:] = 0
    with torch.no_grad(), refused(both, ValueError, "read-only"):
        both.compact.weight[1].numpy()[:] = 0


def test_other_arrays_and_tensor_types_are_read_only_or_copies(weights):
    both = linear(weights)
    weight = both.compact.weight
    for array in (np.asarray(weight.detach()), weight.data.__array__()):
        with refused(both, ValueError, "read-only"):
            array[0] = 1
    for copied in (weight.as_subclass(torch.Tensor), torch.from_dlpack(weight.detach())):
        assert type(copied) is torch.Tensor
        same(copied, both.dense.weight)
        with torch.no_grad():
            copied.zero_()
    both.check()


def test_swapping_the_tensor_raises(weights):
    both = linear(weights)
    with refused(both, RuntimeError, "swap"):
        torch.utils.swap_tensors(both.compact.weight, nn.Parameter(torch.ones(5, 6)))


@pytest.mark.parametrize("change", ["t_", "squeeze_", "resize_", "transpose_"])
def test_changing_the_shape_in_place_raises(weights, change):
    both = linear(weights)
    args = {"resize_": (2, 2), "transpose_": (0, 1)}.get(change, ())
    with torch.no_grad(), refused(both, RuntimeError, f"{change}()", "sparse_comm.densify(model)"):
        getattr(both.compact.weight, change)(*args)


def test_set_raises(weights):
    both = linear(weights)
    with torch.no_grad(), refused(both, RuntimeError, "'weight'", "copy"):
        both.compact.weight.set_(torch.ones(5, 6))
    with refused(both, RuntimeError, "'weight'", "copy"):
        both.compact.weight.data.set_(torch.ones(5, 6))


# ---------------------------------------------------------------- tensors that are kept


def test_a_kept_weight_follows_the_values(weights):
    """A parameter is one tensor for good: ``w = m.weight`` does not go stale."""
    both = linear(weights)
    ours, theirs = both.compact.weight, both.dense.weight
    row, dense_row = ours.data[0], theirs.data[0]
    both.use(lambda m: m.weight.data.mul_(3))
    same(ours, theirs)
    same(row, dense_row)
    with torch.no_grad():
        both.values().mul_(2)
        theirs.mul_(2)
    with torch.no_grad():
        ours.add_(both.dense.weight)
        theirs.add_(both.dense.weight.clone())
        row.mul_(2)
        dense_row.mul_(2)
    both.check()


def test_a_kept_gradient_follows_the_values_gradient(weights):
    both = linear(weights)
    kept = []
    for module in (both.compact, both.dense):
        module(noise(3, 6)).sum().backward()
        kept.append(module.weight.grad)
        module(noise(3, 6)).sum().backward()
    same(kept[0], kept[1] * both.masks["weight"])
    kept[0].mul_(2)
    kept[1].mul_(2)
    both.check_gradients()


def test_a_weight_kept_from_no_grad_still_records_gradients(weights):
    both = linear(weights)
    with torch.no_grad():
        kept = [m.weight for m in (both.compact, both.dense)]
    for weight in kept:
        assert weight.requires_grad
        weight.square().sum().backward()
    both.check_gradients()


# ---------------------------------------------------------------- tools that rewrite weights


def conv_bn(dims: int = 2) -> nn.Sequential:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = nn.Sequential(conv(3, 4, 3), norm(4))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def test_fuse_conv_bn_takes_effect(weights):
    both = pair(conv_bn, weights, noise(2, 3, 8, 8))
    ours, theirs = both.use(lambda m: torch.nn.utils.fuse_conv_bn_eval(m[0], m[1]))
    fused = Pair(ours, theirs, {"weight": both.masks["0.weight"]}, both.inputs)
    fused.check()
    both.check()


def test_fuse_linear_bn_takes_effect(weights):
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
        model[1].running_mean.normal_()
        return model.eval()

    both = pair(make, weights, noise(3, 6))
    ours, theirs = both.use(lambda m: torch.nn.utils.fuse_linear_bn_eval(m[0], m[1]))
    Pair(ours, theirs, {"weight": both.masks["0.weight"]}, both.inputs).check()
    both.check()


@pytest.mark.parametrize("bag", [False, True])
def test_embedding_max_norm_set_after_compact_takes_effect(weights, bag):
    make = (lambda: nn.EmbeddingBag(10, 4)) if bag else (lambda: nn.Embedding(10, 4))
    both = pair(make, weights, torch.tensor([[1, 3], [4, 4]]))
    for module in (both.compact, both.dense):
        module.max_norm = 0.5
    both.check()
    assert both.compact.weight[3].norm() <= 0.5001


def test_embedding_sparse_set_after_compact_raises(weights):
    both = pair(lambda: nn.Embedding(10, 4), weights, torch.tensor([1, 3]))
    both.compact.sparse = True
    with pytest.raises(NotImplementedError, match=r"sparse_comm::pack.*Sparse"):
        both.compact(torch.tensor([1, 3])).sum().backward()
    both.compact.sparse = False
    both.check()


def test_parameters_to_vector_and_back_takes_effect(weights):
    both = linear(weights)
    vector = nn.utils.parameters_to_vector(both.compact.parameters())
    assert vector.numel() == sum(p.numel() for p in both.compact.parameters())
    both.compact(noise(1, 6))
    nn.utils.vector_to_parameters(vector * 2, both.compact.parameters())
    with torch.no_grad():
        for parameter in both.dense.parameters():
            parameter.mul_(2)
    both.check()


# ---------------------------------------------------------------- writes to the values


def test_writes_to_the_values_take_effect(weights):
    both = linear(weights)
    for write in (lambda p: p.mul_(2), lambda p: p.detach().add_(1), lambda p: p[1:].zero_()):
        both.compact(noise(1, 6))
        with torch.no_grad():
            write(both.values())
            both.dense.weight[both.masks["weight"]] = both.values()
        both.check()


def test_initialisers_that_need_a_matrix_refuse_the_values(weights):
    """Loops over parameters() see 1-D values: initialise by way of ``module.weight``."""
    both = linear(weights)
    with refused(both, ValueError, "Fan in and fan out"):
        nn.init.xavier_uniform_(both.values())
    with torch.no_grad():
        nn.init.normal_(both.values(), std=0.1)
        both.dense.weight[both.masks["weight"]] = both.values()
    both.check()


def test_replacing_the_data_of_the_values_takes_effect_each_time(weights):
    both = linear(weights)
    values = both.values()
    for _ in range(5):
        values.data = values.data * 2
        values.data = values.data * 2
        both.dense.weight.data *= 4
        same(both.compact(*both.inputs), both.dense(*both.inputs))
    both.check()


def test_writes_through_data_of_the_values_take_effect_after_values_changed(weights):
    both = linear(weights)
    both.compact(noise(1, 6))
    both.values().data.mul_(2)
    both.dense.weight.data.mul_(2)
    sparse_comm.values_changed(both.compact)
    both.check()
