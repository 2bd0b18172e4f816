"""Modules of every kind compute and learn when compact as the masked dense ones do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_comm
from tests.compact.uses import (
    MODES,
    mask_like,
    noise,
    pair,
    same,
    trains,
)

pytestmark = MODES


# ---------------------------------------------------------------- layers


LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (noise(3, 6),)),
    "Bilinear": (lambda: nn.Bilinear(3, 4, 5), (noise(2, 3), noise(2, 4))),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (noise(2, 4, 7),)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (noise(2, 3, 6, 6),)),
    "Conv2d, circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (noise(2, 3, 6, 6),),
    ),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), (noise(1, 2, 3, 4, 4),)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), (noise(2, 4, 5),)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (noise(2, 4, 5, 5),)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (noise(1, 2, 3, 3, 3),)),
    "Embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), (torch.tensor([[0, 2], [8, 2]]),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), (torch.tensor([[0, 2], [8, 2]]),)),
    "EmbeddingBag, max": (
        lambda: nn.EmbeddingBag(9, 4, mode="max"),
        (torch.tensor([0, 2, 8]), torch.tensor([0, 1])),
    ),
    "PReLU": (lambda: nn.PReLU(5), (noise(3, 5),)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_train_as_when_masked(weights, layer):
    make, inputs = LAYERS[layer]
    torch.manual_seed(0)
    masks = {"weight": mask_like(make().weight)}
    trains(pair(make, weights, *inputs, masks=masks))


NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(6), (3, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (3, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(6), (3, 6, 2, 2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 4)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_biases_train_as_when_masked(weights, norm):
    make, shape = NORMS[norm]
    masks = {name: mask_like(noise(6)) for name, _ in make().named_parameters()}
    trains(pair(make, weights, noise(*shape), masks=masks))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}],
)
def test_rnns_train_as_when_masked(weights, cls, options):
    trains(pair(lambda: cls(5, 7, **options), weights, noise(4, 3, 5)))


def test_lstm_with_projection_trains_as_when_masked(weights):
    trains(pair(lambda: nn.LSTM(5, 7, proj_size=3, bidirectional=True), weights, noise(4, 3, 5)))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_rnn_cells_train_as_when_masked(weights, cell):
    trains(pair(lambda: cell(5, 7), weights, noise(3, 5)))


def test_rnns_take_packed_sequences_and_initial_states(weights):
    both = pair(lambda: nn.LSTM(5, 7), weights, noise(4, 3, 5), (noise(1, 3, 7), noise(1, 3, 7)))
    both.check()
    sequence = nn.utils.rnn.pack_padded_sequence(noise(4, 3, 5), [4, 2, 1])
    same(both.compact(sequence)[0].data, both.dense(sequence)[0].data)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_rnns_can_be_copied_cast_flattened_and_densified(weights, cls):
    both = pair(lambda: cls(5, 7, num_layers=2), weights, noise(4, 3, 5))
    both.compact = copy.deepcopy(both.compact)
    both.check()
    both.use(lambda m: m.double())
    both.check(noise(4, 3, 5).double())
    both.use(lambda m: m.float())
    both.use(lambda m: m.flatten_parameters())
    both.use(lambda m: m.weight_ih_l0.data.mul_(2))
    both.check()
    sparse_comm.densify(both.compact)
    assert type(both.compact) is cls
    same(both.compact(*both.inputs), both.dense(*both.inputs))
    same(
        both.compact.double()(noise(1, 1, 5).double()), both.dense.double()(noise(1, 1, 5).double())
    )


# ---------------------------------------------------------------- attention


def test_self_attention_trains_as_when_masked(weights):
    x = noise(2, 5, 16)
    trains(pair(lambda: nn.MultiheadAttention(16, 4, batch_first=True), weights, x, x, x))


def test_cross_attention_with_other_widths_trains_as_when_masked(weights):
    def make() -> nn.Module:
        return nn.MultiheadAttention(16, 4, kdim=6, vdim=10, batch_first=True, add_bias_kv=True)

    trains(pair(make, weights, noise(2, 5, 16), noise(2, 3, 6), noise(2, 3, 10)))


def test_modules_of_one_class_have_compact_parameters_of_their_own(weights):
    """The property is the class's: attributes of other modules of the class are as they were."""
    x = noise(2, 5, 16)
    one = pair(lambda: nn.MultiheadAttention(16, 4, add_bias_kv=True), weights, x, x, x)
    other = pair(lambda: nn.MultiheadAttention(16, 4), weights, x, x, x)
    assert "bias_k" in one.masks
    assert other.compact.bias_k is None
    other.check()
    other.compact.bias_k = other.dense.bias_k = noise(1, 1, 16)
    other.compact.bias_v = other.dense.bias_v = noise(1, 1, 16)
    other.check()
    del other.compact.bias_k
    with pytest.raises(AttributeError, match="bias_k"):
        other.compact.bias_k  # noqa: B018
    one.check()


def layer(**options) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_trains_as_when_masked(weights, norm_first):
    trains(pair(lambda: layer(norm_first=norm_first, activation="gelu"), weights, noise(2, 5, 16)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_encoder_fast_path_computes_the_same(weights, mode):
    """The dense layer takes its fused path; the compact one goes the ordinary way."""

    def make() -> nn.Module:
        return nn.TransformerEncoder(layer(), 2).eval()

    both = pair(make, weights, noise(2, 5, 16))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with mode():
        same(both.compact(noise(2, 5, 16)), both.dense(noise(2, 5, 16)), exact=False)
        ours = both.compact(noise(2, 5, 16), src_key_padding_mask=padding)
        theirs = both.dense(noise(2, 5, 16), src_key_padding_mask=padding)
        same(ours[~padding], theirs[~padding], exact=False)
    trains(both)


def test_a_whole_transformer_trains_as_when_masked(weights):
    def make() -> nn.Module:
        return nn.Transformer(16, 2, 1, 2, 32, dropout=0.1, batch_first=True)

    trains(pair(make, weights, noise(2, 5, 16), noise(2, 3, 16)))


# ---------------------------------------------------------------- bare parameters, containers, ties


class Experts(nn.Module):
    """Bare parameters of three dimensions, in lists and in dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.items = nn.ParameterList([torch.randn(4, 4) for _ in range(2)])
        self.named = nn.ParameterDict({"a": torch.randn(4, 4), "b": torch.randn(4)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.items[0] @ self.items[1] @ self.named["a"] + self.named["b"]
        total = sum(p.sum() for p in self.items) + sum(p.sum() for p in self.named.values())
        return torch.einsum("bi,eij->bej", x, self.experts) + total


def test_bare_parameters_lists_and_dicts_train_as_when_masked(weights):
    both = pair(Experts, weights, noise(2, 4))
    trains(both)
    assert "ParameterList" in str(both.compact)
    assert len(both.compact.items) == 2
    assert list(both.compact.named) == ["a", "b"]
    both.use(lambda m: m.items[1].data.mul_(2))
    both.use(lambda m: nn.init.normal_(m.named["a"]))
    both.check()
    sparse_comm.densify(both.compact)
    assert type(both.compact.items) is nn.ParameterList
    same(both.compact(*both.inputs), both.dense(*both.inputs))


def test_assigning_to_lists_and_dicts_packs(weights):
    both = pair(Experts, weights, noise(2, 4))

    def assign(model: nn.Module) -> None:
        model.items[0] = nn.Parameter(noise(4, 4))
        model.named["a"] = nn.Parameter(noise(4, 4, seed=1))
        model.experts = nn.Parameter(noise(3, 4, 5))

    both.use(assign)
    both.check()


class Twice(nn.Module):
    """One layer used twice in a forward pass, and registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.other = nn.Linear(6, 6)
        self.other.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.second(self.first(x).tanh()).tanh())


def test_layers_used_twice_shared_and_tied_train_as_when_masked(weights):
    both = pair(Twice, weights, noise(3, 6))
    both.masks["second.weight"] = both.masks["other.weight"] = both.masks["first.weight"]
    both.check()
    both.masks.pop("second.weight"), both.masks.pop("other.weight")
    trains(both)
    assert len(list(both.compact.parameters())) == 3


def test_an_unused_layer_gets_no_gradient(weights):
    class Unused(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(x)

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 2)

    trains(pair(Unused, weights, noise(3, 6)))


def test_a_frozen_layer_under_a_trained_one(weights):
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        model[2].requires_grad_(False)
        return model

    both = pair(make, weights, noise(3, 6))
    assert not both.values("2.weight").requires_grad
    trains(both)


def test_train_and_eval_dropout_and_batch_norm(weights):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))

    both = pair(make, weights, noise(5, 6))
    both.use(lambda m: m(noise(5, 6)).sum().backward())
    both.use(lambda m: m.eval())
    both.check()


# ---------------------------------------------------------------- forwards of all sorts


def test_functions_of_the_weight_train_as_when_masked(weights):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            normal = w / w.norm(dim=1, keepdim=True)
            q, k = w.chunk(2)
            mixed = torch.cat([q, k.flip(0)]) + torch.stack(list(w.unbind())) + F.normalize(w)
            return F.linear(x @ normal.t() + x @ w[:, [1, 0, 2, 3, 4, 5]], mixed, w[0])

    trains(pair(Odd, weights, noise(3, 6)))


def test_a_custom_autograd_function_of_the_weight_trains_as_when_masked(weights):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.t() @ x

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return Function.apply(x, self.weight) + self.bias

    trains(pair(lambda: Layer(6, 5), weights, noise(3, 6)))


def test_an_autograd_function_that_gives_back_the_weight_or_a_view_trains_as_when_masked(weights):
    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight: Tensor) -> Tensor:
            return weight

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return grad

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight: Tensor) -> Tensor:
            ctx.shape = weight.shape
            return weight[2:]

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            whole = grad.new_zeros(ctx.shape)
            whole[2:] = grad
            return whole

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            same, half = Same.apply(self.weight), Half.apply(self.weight)
            assert (half.grad_fn is not None) == same.requires_grad == torch.is_grad_enabled()
            return x @ same.reshape(5, 6).t() + F.pad(x @ half.t(), (2, 0))

    trains(pair(lambda: Layer(6, 5, bias=False), weights, noise(3, 6)))
