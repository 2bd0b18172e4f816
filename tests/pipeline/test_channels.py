"""Channels that are not sent change nothing, in either pass: whatever stands at the boundary."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparse_comm
from sparse_comm.pipeline import (
    Channels,
    Keep,
    Restore,
    insert,
    layers_of,
    plan_channels,
    read_channels,
    written_channels,
)

Masks = dict[str, Tensor]


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def masked(
    stage: nn.Module, rows: dict[str, list[int]], columns: dict[str, list[int]], affine=()
) -> Masks:
    """Masks that prune whole rows, with their bias, and columns, and other entries at random."""
    masks = sparse_comm.prune.magnitude(stage, 0.3, scope="layer")
    for name, pruned in rows.items():
        masks[f"{name}.weight"][pruned] = False
        layer = stage.get_submodule(name)
        if layer.bias is not None:
            masks[f"{name}.bias"] = torch.ones_like(layer.bias, dtype=torch.bool)
            masks[f"{name}.bias"][pruned] = False
    for name, pruned in columns.items():
        masks[f"{name}.weight"][:, pruned] = False
    for name, pruned in affine:
        for kind in ("weight", "bias"):
            masks[f"{name}.{kind}"] = torch.ones(stage.get_submodule(name).num_features).bool()
            masks[f"{name}.{kind}"][pruned] = False
    return masks


def linear_after_relu() -> tuple:
    writer = nn.Sequential(nn.Linear(10, 12), nn.ReLU())
    reader = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
    masks = masked(writer, {"0": [1, 4]}, {}), masked(reader, {}, {"1": [4, 5, 11]})
    return writer, reader, *masks, torch.randn(6, 10), 8


def sequences() -> tuple:
    writer = nn.Sequential(nn.Linear(10, 12), nn.GELU())
    reader = nn.Sequential(nn.Linear(12, 8))
    masks = masked(writer, {"0": [0]}, {}), masked(reader, {}, {"0": [2]})
    return writer, reader, *masks, torch.randn(2, 7, 10), 10


def convolutions() -> tuple:
    writer = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(conv(3, 8), nn.ReLU()), nn.MaxPool2d(2))
    reader = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU())
    masks = masked(writer, {"1.0": [7]}, {}), masked(reader, {}, {"2": [0, 3]})
    return writer, reader, *masks, torch.randn(2, 3, 8, 8), 5


def grouped() -> tuple:
    writer = nn.Sequential(conv(4, 8, groups=2, bias=False))
    reader = nn.Sequential(nn.ReLU(), conv(8, 6, groups=2))
    of_reader = masked(reader, {}, {})
    of_reader["1.weight"][3:, 1] = False  # input 1 of the second group: channel 5
    return writer, reader, masked(writer, {"0": [2]}, {}), of_reader, torch.randn(2, 4, 8, 8), 6


def flattened_by_the_reader() -> tuple:
    writer = nn.Sequential(conv(3, 8), nn.ReLU())
    reader = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8 * 16, 5))
    of_reader = masked(reader, {}, {"2": list(range(16, 32))})
    return writer, reader, masked(writer, {"0": [6]}, {}), of_reader, torch.randn(2, 3, 8, 8), 6


def flattened_by_the_writer() -> tuple:
    writer = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten())
    reader = nn.Sequential(nn.Linear(4 * 64, 5))
    of_reader = masked(reader, {}, {"0": [3, 5, 70]})
    return writer, reader, masked(writer, {"0": [2]}, {}), of_reader, torch.randn(2, 3, 8, 8), 189


def behind_a_norm() -> tuple:
    writer = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.SiLU())
    reader = nn.Sequential(conv(8, 4))
    of_writer = masked(writer, {}, {}, [("1", [2, 3])])
    return writer, reader, of_writer, masked(reader, {}, {}), torch.randn(2, 3, 8, 8), 6


def subclassed() -> tuple:
    class Stage(nn.Sequential):
        def get_input_shape(self):
            return [-1, 10]

    writer = Stage(nn.Linear(10, 12), nn.ReLU())
    reader = nn.Linear(12, 8)
    of_reader = sparse_comm.prune.magnitude(reader, 0.3)
    of_reader["weight"][:, 3] = False
    return writer, reader, masked(writer, {"0": [1]}, {}), of_reader, torch.randn(6, 10), 10


CASES = [
    *(linear_after_relu, sequences, convolutions, grouped, flattened_by_the_reader),
    *(flattened_by_the_writer, behind_a_norm, subclassed),
]


def plan(writer: nn.Module, reader: nn.Module, of_writer: Masks, of_reader: Masks):
    return plan_channels(
        written_channels(list(layers_of(writer)), of_writer),
        read_channels(layers_of(reader), of_reader),
    )


@pytest.mark.parametrize("compact", [None, "cached", "transient"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_both_passes_are_those_without_it(case: Callable[[], tuple], compact: str | None):
    torch.manual_seed(0)
    writer, reader, of_writer, of_reader, x, sent = case()
    for stage, masks in ((writer, of_writer), (reader, of_reader)):
        for name, mask in masks.items():
            stage.get_parameter(name).data.mul_(mask)
        if compact:
            sparse_comm.compact(stage, masks, weights=compact)
    channels = plan(writer, reader, of_writer, of_reader)
    assert channels is not None
    assert channels.kept.numel() == sent
    plain = copy.deepcopy((writer, reader))
    packed = copy.deepcopy((writer, reader))
    insert(packed[0], last=channels)
    insert(packed[1], first=channels)
    results = []
    for first, second in (plain, packed):
        torch.manual_seed(1)
        y = first(x)
        between = y.detach().requires_grad_()
        out = second(between)
        out.square().sum().backward()
        y.backward(between.grad)
        gradients = [
            parameter.grad if compact or name not in masks else parameter.grad * masks[name]
            for stage, masks in ((first, of_writer), (second, of_reader))
            for name, parameter in stage.named_parameters()
        ]
        results.append((between, out, gradients))
    (full, expected, of_plain), (small, found, of_packed) = results
    assert small.numel() * channels.count == full.numel() * sent
    assert small.grad.shape == small.shape
    assert torch.equal(expected, found)
    for a, b in zip(of_plain, of_packed, strict=True):
        assert torch.equal(a, b)


def reads(reader: nn.Module, name: str) -> object:
    masks = {name: torch.ones_like(reader.get_parameter(name), dtype=torch.bool)}
    masks[name][:, 0] = False
    return read_channels(layers_of(reader), masks)


@pytest.mark.parametrize(
    "between",
    [
        nn.LayerNorm(12),
        nn.GroupNorm(3, 12),
        nn.Softmax(-1),
        nn.Bilinear(1, 1, 1),
        nn.TransformerEncoderLayer(12, 2),
        nn.Unflatten(1, (3, 4)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_may_mix_channels_reads_all_of_them(between):
    assert reads(nn.Sequential(nn.ReLU(), nn.Linear(12, 4)), "1.weight") is not None
    assert reads(nn.Sequential(between, nn.Linear(12, 4)), "1.weight") is None


def test_a_forward_of_the_users_reads_all():
    class Mine(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + x.sum()

    class MyLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.sum()

    assert reads(Mine(nn.Linear(12, 4)), "0.weight") is None
    assert reads(nn.Sequential(MyLinear(12, 4)), "0.weight") is None
    hooked = nn.Sequential(nn.ReLU(), nn.Linear(12, 4))
    hooked[0].register_forward_pre_hook(lambda module, args: (args[0] + args[0].sum(),))
    assert reads(hooked, "1.weight") is None


def test_a_bias_that_is_trained_makes_no_constant():
    layers = list(layers_of(nn.Sequential(nn.Linear(3, 4))))
    mask = torch.tensor([[True] * 3, [False] * 3, [True] * 3, [False] * 3])
    assert written_channels(layers, {"0.weight": mask}).needed.all()
    bias = torch.tensor([True, True, True, False])
    side = written_channels(layers, {"0.weight": mask, "0.bias": bias})
    assert side.needed.tolist() == [True, True, True, False]


def test_channels_of_different_dimensions_are_not_taken_for_one_another():
    """A Linear after a convolution, with nothing between, reads the last dimension."""
    writer = written_channels(
        list(layers_of(conv(3, 8, bias=False))), {"weight": torch.zeros(8, 3, 3, 3).bool()}
    )
    reader = read_channels(layers_of(nn.Linear(8, 2)), {"weight": torch.zeros(2, 8).bool()})
    assert plan_channels(writer, reader) is None
    assert plan_channels(None, None) is None


def test_where_nothing_is_needed_one_channel_is_sent():
    reader = read_channels(layers_of(nn.Linear(8, 2)), {"weight": torch.zeros(2, 8).bool()})
    channels = plan_channels(None, reader)
    assert channels.kept.tolist() == [0]


def test_a_tensor_of_another_size_is_refused():
    channels = Channels(1, torch.tensor([0, 2]), torch.zeros(4).bool(), "")
    with pytest.raises(ValueError, match=r"shape \(3, 5\), expected 4 channels in dimension 1"):
        Keep(channels)(torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"shape \(3, 4\), expected 2 channels in dimension 1"):
        Restore(channels)(torch.ones(3, 4))


def test_weights_that_are_not_zero_where_the_masks_prune_are_noticed():
    """Dense stages that somebody forgot to mask."""
    writer, reader, of_writer, of_reader, x, _ = linear_after_relu()
    channels = plan(writer, reader, of_writer, of_reader)
    for name, mask in of_writer.items():
        writer.get_parameter(name).data.mul_(mask)
    plain = copy.deepcopy(writer)
    insert(writer, last=channels)
    insert(reader, first=channels)
    small = writer(x)
    with pytest.raises(RuntimeError, match="a stage reads channels that its masks prune"):
        reader(small)
    plain[0].bias.data.fill_(1.0)
    insert(plain, last=channels)
    with pytest.raises(RuntimeError, match="a stage writes to channels that its masks make zero"):
        plain(x)


def test_what_is_not_finite_is_looked_at_later():
    """torch infers shapes from uninitialized memory."""
    writer, reader, of_writer, of_reader, *_ = linear_after_relu()
    channels = plan(writer, reader, of_writer, of_reader)
    insert(reader, first=channels)
    reader(torch.full((6, channels.kept.numel()), torch.nan))
    with pytest.raises(RuntimeError, match="a stage reads channels"):
        reader(torch.randn(6, channels.kept.numel()))


def test_constants_that_are_not_zero_are_sent():
    mask = {"0.weight": torch.zeros(4, 3).bool(), "0.bias": torch.zeros(4).bool()}
    assert written_channels(list(layers_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))), mask)
    for module in (nn.Sigmoid(), nn.Softplus(), nn.Hardsigmoid(), nn.LogSigmoid()):
        row = nn.Sequential(nn.Linear(3, 4), module)
        assert written_channels(list(layers_of(row)), mask) is None


@pytest.mark.parametrize("between", [nn.BatchNorm1d(4), nn.AvgPool1d(2), nn.InstanceNorm1d(4)])
def test_a_linear_behind_what_looks_at_another_dimension_reads_all(between):
    """Of (N, channels, features) the one has dimension 1, the other the last."""
    assert reads(nn.Sequential(between, nn.Linear(6, 3)), "1.weight") is None
    pools = [layer for layer in (between,) if isinstance(layer, nn.AvgPool1d)]
    mask = {"0.weight": torch.zeros(12, 3).bool(), "0.bias": torch.zeros(12).bool()}
    for pool in pools:
        row = list(layers_of(nn.Sequential(nn.Linear(3, 12), pool)))
        assert written_channels(row, mask) is None


def test_layers_that_were_changed_read_all():
    patched = nn.Sequential(nn.Linear(12, 4))
    patched[0].forward = lambda x: nn.functional.linear(x, patched[0].weight) + x.sum()
    assert reads(patched, "0.weight") is None
    hooked = nn.Sequential(nn.Linear(12, 4))
    hooked[0].register_full_backward_hook(lambda module, given, out: None)
    assert reads(hooked, "0.weight") is None


def test_a_module_that_is_used_twice_is_seen_twice():
    act = nn.Sigmoid()
    row = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act)
    assert [name for name, _ in layers_of(row)] == ["0", "1", "2", "3"]
