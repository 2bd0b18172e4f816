"""Pruned channels are gone: neither what writes them nor what reads them matters any more."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_comm
from scripts.lib.model import GPT
from sparse_comm.pipeline import layers_of, plan_channels, read_channels, written_channels

Case = tuple[nn.Module, tuple[Tensor, ...]]


def mlp() -> Case:
    layers = [nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers), (torch.randn(5, 10),)


def cnn() -> Case:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, groups=2), nn.Hardswish(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * 49, 10)), (torch.randn(2, 3, 32, 32),)


class Residual(nn.Module):
    def __init__(self, depthwise: bool = False) -> None:
        super().__init__()
        groups = 8 if depthwise else 1
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=groups)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(self.last(x).mean((2, 3)))


def residual() -> Case:
    return Residual(), (torch.randn(2, 3, 8, 8),)


def depthwise() -> Case:
    return Residual(depthwise=True), (torch.randn(2, 3, 8, 8),)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(6, 4)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([F.silu(self.one(x)), F.relu(self.other(x))], -1))


def joined() -> Case:
    return Joined(), (torch.randn(3, 6),)


class Heads(nn.Module):
    """Attention with a weight each for query, key and value."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 24) for _ in range(3))
        self.out = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        parts = [
            layer(x).unflatten(-1, (6, 4)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*parts)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def heads() -> Case:
    return Heads(), (torch.randn(2, 5, 16),)


def encoder_layer() -> Case:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (torch.randn(2, 5, 16),)


def gpt() -> Case:
    tokens = torch.arange(16).view(2, 8)
    return GPT(2, 128, 16), (tokens, tokens)


class Twice(nn.Module):
    """A layer is used twice, another one's result is written into a part, and powers are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 8), nn.Linear(8, 8)
        self.part, self.power = nn.Linear(6, 4), nn.Linear(6, 8)
        self.last = nn.Linear(12, 2)
        self.free, self.end = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
        y = torch.pow(torch.sigmoid(y), torch.sigmoid(self.power(x)))
        joined = y.new_zeros(len(x), 12)
        joined[:, :8] = torch.add(y, other=self.power(x))
        joined[:, 8:] = self.part(x)
        return self.last(joined) + self.end(torch.relu(self.free(x)))


def twice() -> Case:
    return Twice(), (torch.randn(3, 6),)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


def tied_head() -> Case:
    return TiedHead(), (torch.arange(14).view(2, 7) % 7,)


CASES = [mlp, cnn, residual, depthwise, joined, heads, encoder_layer, gpt, tied_head]


def disturbed(model: nn.Module, masks: dict[str, Tensor], writers: bool) -> nn.Module:
    """With pruned rows (or else columns) at random, and all else that is pruned zero."""
    changed = copy.deepcopy(model)
    for name, mask in masks.items():
        parameter = changed.get_parameter(name).data
        rows = mask.flatten(1).any(1) if mask.ndim > 1 else mask
        of_rows = ~rows.reshape(-1, *[1] * (mask.ndim - 1)).expand_as(mask)
        noise = torch.randn_like(parameter)
        kept = of_rows if writers else ~of_rows & ~mask
        parameter.copy_(torch.where(mask, parameter, noise * kept))
    return changed


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_neither_writers_nor_readers_of_pruned_channels_matter(case: Callable[[], Case], scope):
    torch.manual_seed(0)
    model, inputs = case()
    before = copy.deepcopy(model.state_dict())
    masks = sparse_comm.prune.channels(model, 0.5, scope, example=inputs)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    model.eval()
    pruned = disturbed(model, masks, writers=False)
    for name, mask in masks.items():
        pruned.get_parameter(name).data.mul_(mask)
    expected = pruned(*inputs)
    assert not torch.allclose(expected, model(*inputs), atol=1e-4)
    torch.testing.assert_close(disturbed(model, masks, writers=True)(*inputs), expected)
    torch.testing.assert_close(disturbed(model, masks, writers=False)(*inputs), expected)


def test_what_is_used_twice_or_written_into_a_part_stays():
    model, inputs = twice()
    masks = sparse_comm.prune.channels(model, 0.5, example=inputs)
    assert set(masks) == {"free.weight", "free.bias", "end.weight"}


def test_layers_of_one_output_are_kept():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    masks = sparse_comm.prune.channels(model, 0.5, example=torch.randn(1, 4))
    assert rows_left(masks, "0.weight") == 3
    assert masks["2.weight"].sum() == 3


def rows_left(masks: dict[str, Tensor], name: str) -> int:
    return int(masks[name].flatten(1).any(1).sum())


def test_so_many_channels_of_each_layer_go():
    model, _ = mlp()
    masks = sparse_comm.prune.channels(model, 0.75)
    assert rows_left(masks, "0.weight") == 4
    assert rows_left(masks, "2.weight") == 3
    assert "4.bias" not in masks
    assert masks["4.weight"].all(0).sum() == 3


def test_the_smallest_go_first():
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
    model[0].weight.data = torch.tensor([[3.0, 0], [0, 1], [2, 2], [-0.5, 0.5]])
    masks = sparse_comm.prune.channels(model, 0.5)
    assert masks["0.weight"][:, 0].tolist() == [True, False, True, False]
    assert masks["1.weight"].tolist() == [[True, False, True, False]]


def test_heads_go_as_a_whole_and_with_query_key_and_value():
    model, inputs = heads()
    masks = sparse_comm.prune.channels(model, 0.5, example=inputs)
    rows = [masks[f"{name}.weight"].all(1) for name in ("query", "key", "value")]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[0], masks["out.weight"].all(0))
    by_head = rows[0].view(6, 4)
    assert by_head.all(1).sum() == 3
    assert torch.equal(by_head.all(1), by_head.any(1))


def test_channels_that_a_residual_adds_go_together():
    model, inputs = residual()
    masks = sparse_comm.prune.channels(model, 0.5, example=inputs)
    kept = masks["stem.weight"].flatten(1).any(1)
    assert torch.equal(kept, masks["second.weight"].flatten(1).any(1))
    assert torch.equal(kept, masks["last.weight"].flatten(2).any(2).any(0))


def test_one_channel_of_a_layer_stays():
    model, _ = mlp()
    for scope in ("layer", "global"):
        masks = sparse_comm.prune.channels(model, 1.0, scope)
        assert rows_left(masks, "0.weight") == rows_left(masks, "2.weight") == 1


def test_a_residual_stream_under_layer_norms_stays():
    model, inputs = gpt()
    masks = sparse_comm.prune.channels(model, 0.5, example=inputs)
    assert not any("embedding" in name or "norm" in name for name in masks)
    assert rows_left(masks, "blocks.0.mlp.0.weight") == 256
    assert rows_left(masks, "blocks.0.mlp.2.weight") == 128


@pytest.mark.parametrize("size", [28, 32])
def test_an_example_is_made_up_for_images(size):
    side = size // 2
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4 * side * side, 2)
    )
    masks = sparse_comm.prune.channels(model, 0.5)
    assert rows_left(masks, "0.weight") == 2


def test_bad_input_is_refused():
    model, _ = mlp()
    with pytest.raises(ValueError, match="sparsity must be between 0 and 1, got 2"):
        sparse_comm.prune.channels(model, 2)
    with pytest.raises(ValueError, match="scope must be 'global' or 'layer', got 'all'"):
        sparse_comm.prune.channels(model, 0.5, "all")
    with pytest.raises(ValueError, match="no channel of the model can be pruned"):
        sparse_comm.prune.channels(nn.Linear(3, 3), 0.5)
    with pytest.raises(ValueError, match="give example=, an input of the model"):
        sparse_comm.prune.channels(nn.Identity(), 0.5)
    odd = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(7, 2))
    with pytest.raises(ValueError, match=r"none could be made up .*cannot be multiplied"):
        sparse_comm.prune.channels(odd, 0.5)


def test_a_pipeline_cut_there_sends_the_others_only():
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))
    masks = sparse_comm.prune.channels(model, 0.5)
    writer = written_channels(
        list(layers_of(model[:2])), {n: m for n, m in masks.items() if n.startswith("0")}
    )
    reader = read_channels(layers_of(model[2:]), {"0.weight": masks["2.weight"]})
    assert plan_channels(writer, reader).kept.numel() == 8
