"""The models of ``compare_comm.py --pipeline``: each a list of layers, and where it may be cut."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model import Attention

CLASSES = 10
VGG, WIDE_STEM, WIDE_RESNET = "VGG-like", "wide stem", "WideResNet-like"
SQUARED, PLAIN = "GPT, squared ReLU", "GPT"
IMAGES = (VGG, WIDE_STEM, WIDE_RESNET)
MODELS = (*IMAGES, SQUARED, PLAIN)
WIDTH, BLOCKS, VOCABULARY = 256, 4, 256


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """With a norm and a ReLU behind it."""
    padding = kernel // 2 if stride < kernel else 0
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg() -> list[nn.Module]:
    """Two convolutions and a pool, three times."""
    layers = [*conv(1, 32), *conv(32, 32), nn.MaxPool2d(2)]
    layers += [*conv(32, 64), *conv(64, 64), nn.MaxPool2d(2)]
    layers += [*conv(64, 128), *conv(128, 128), nn.MaxPool2d(2), nn.Flatten()]
    return [*layers, nn.Linear(128 * 9, CLASSES)]


def wide_stem() -> list[nn.Module]:
    """A stem at full resolution, and then patches of 4 × 4."""
    layers = [*conv(1, 64, 5), *conv(64, 64, 4, 4), nn.Flatten()]
    return [*layers, nn.Linear(64 * 49, CLASSES)]


class WideBlock(nn.Module):
    """Of a pre-activation WideResNet (Zagoruyko & Komodakis, 2016): all read relu(norm(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int, activated: bool) -> None:
        super().__init__()
        self.norm1 = nn.Identity() if activated else nn.BatchNorm2d(inputs)
        self.activated, self.same = activated, inputs == outputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = (
            nn.Identity() if self.same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.activated else torch.relu(self.norm1(x))
        rest = x if self.same else self.shortcut(y)
        return rest + self.conv2(torch.relu(self.norm2(self.conv1(y))))


def wide_resnet() -> list[nn.Module]:
    """Three groups of two blocks; the norm and the ReLU that start a group are their own layers."""
    layers: list[nn.Module] = [
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        WideBlock(32, 32, 1, False),
    ]
    for inputs, outputs in ((32, 64), (64, 128)):
        layers += [nn.BatchNorm2d(inputs), nn.ReLU(), WideBlock(inputs, outputs, 2, True)]
        layers.append(WideBlock(outputs, outputs, 1, False))
    layers += [nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*layers, nn.Linear(128, CLASSES)]


class Embed(nn.Module):
    def __init__(self, context: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(context, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight[: tokens.shape[1]]


class Attend(nn.Module):
    """The first half of a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), Attention(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


class Up(nn.Module):
    """The first half of an MLP: gives the residual stream, and the hidden activations."""

    def __init__(self, squared: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.squared = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            squared,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(self.norm(x))
        return x, torch.relu(hidden).square() if self.squared else F.gelu(hidden)


class Down(nn.Module):
    """The other half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        return x + self.linear(hidden)


def gpt(squared: bool, context: int) -> list[nn.Module]:
    layers: list[nn.Module] = [Embed(context)]
    for _ in range(BLOCKS):
        layers += [Attend(), Up(squared), Down()]
    return [*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)]


class Row(nn.Sequential):
    """Layers of a stage; what gives several tensors gives the next one several."""

    def forward(self, *given: Tensor) -> Tensor | tuple[Tensor, ...]:
        for layer in self:
            given = layer(*given)
            given = given if isinstance(given, tuple) else (given,)
        return given if len(given) > 1 else given[0]


@dataclass(frozen=True)
class Model:
    """A model, and how it is cut.

    Attributes:
        layers: makes them.
        cuts: by the number of stages: before which layers.
        batch: samples of a micro-batch.
        penalty: of the mean of the activations at the first cut of two stages, in the warm-up.
        what: for the report.
    """

    layers: Callable[[], list[nn.Module]]
    cuts: dict[int, list[int]]
    batch: int
    what: str
    penalty: float = 0.0


CONTEXT = 64

ALL = {
    VGG: Model(vgg, {2: [10], 3: [7, 14]}, 16, "cut between the convolutions of its second block"),
    WIDE_STEM: Model(
        wide_stem, {2: [3]}, 16, "cut behind its stem; trained with an L1 penalty there", 1.0
    ),
    WIDE_RESNET: Model(wide_resnet, {2: [4], 3: [4, 8]}, 16, "cut where its groups begin"),
    SQUARED: Model(
        lambda: gpt(True, CONTEXT), {2: [6], 3: [3, 9]}, 2, "cut inside an MLP, with the residual"
    ),
    PLAIN: Model(lambda: gpt(False, CONTEXT), {2: [7], 3: [4, 10]}, 2, "cut between blocks"),
}


def stages(model: Model, layers: list[nn.Module], count: int) -> list[nn.Module]:
    """The stages of some layers; plain rows of layers where they are, whose masks may be read.

    Each keeps its layers' numbers as names.
    """
    bounds = [0, *model.cuts[count], len(layers)]
    made: list[nn.Module] = []
    for first, last in itertools.pairwise(bounds):
        row = {str(number): layers[number] for number in range(first, last)}
        several = any(isinstance(layer, Up | Down) for layer in row.values())
        kind = Row if several else nn.Sequential
        stage = kind()
        for name, layer in row.items():
            stage.add_module(name, layer)
        made.append(stage)
    return made


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float().flatten(0, -2), target.flatten())
