"""The optimizer step from bf16 gradients to bf16 weights, dense with fp32 masters and compact.

Each way owns the matrices of a GPT and makes the same step of AdamW (weight decay included) from
the same dense bf16 gradients, and writes the dense bf16 weights that the next forward pass reads:

- dense: upcasts the gradient into the fp32 ``grad`` of the masters, steps all of them, holds the
  pruned ones at zero with one fp32 multiplication by the mask, and copies them to bf16.
- dense, leaner mask: multiplies the bf16 gradient by a bf16 mask instead, half the bytes; pruned
  masters get zero gradients and stay zero.
- compact: ``kernels.pack`` writes the unpruned gradients into the fp32 ``grad`` of the values, all
  values are stepped, ``kernels.expand`` writes the weights, zeros included.
- compact, all in torch: the same with ``index_select`` (int32), ``zero_`` and ``index_copy_``.

All of them call ``torch.optim.AdamW(fused=True)`` on one parameter a matrix, and allocate nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_comm import SparsityPattern, kernels

from . import kernel_timing
from .bench import Estimate
from .kernel_cases import BF16, FP32, ours, use
from .kernel_timing import Side, interleave

WIDTHS = (768, 256)  # of the GPT; the second where there is no room for a block of the first
DENSITIES = (0.1, 0.2, 0.5)
DENSE, DENSE_LEAN = "dense, fp32 mask on the weights", "dense, bf16 mask on the gradient"
COMPACT, COMPACT_TORCH = "compact", "compact, all in torch"
WAYS = 2 + 2 * len(DENSITIES)
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
BF16_ULP = 2**-7  # relative
NEAR_ZERO = 0.01 * LEARNING_RATE  # where a difference relative to the weight means nothing


@dataclass(frozen=True)
class StepRow:
    """One way to step."""

    how: str
    density: float
    numel: int
    width: int
    time: Estimate
    of_dense: Estimate  # of the time of DENSE
    of_lean: Estimate  # of the time of DENSE_LEAN
    wrong: bool  # whether the weights are further from the exact ones than rounding explains
    seconds: list[float] = field(repr=False)

    @property
    def of_best(self) -> Estimate:
        """Of the time of the faster dense way."""
        return max(self.of_dense, self.of_lean, key=lambda ratio: ratio.value)


def _adamw(parameters: list[torch.nn.Parameter], fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=False, fused=fused
    )


class Way(ABC):
    """Parameters and optimizer of one way to step."""

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor]) -> None:
        self.gradients = gradients
        self.parameters = [torch.nn.Parameter(p) for p in parameters]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.grads = [p.grad for p in self.parameters if p.grad is not None]
        self.weights = [torch.zeros_like(gradient) for gradient in gradients]
        self.optimizer = _adamw(self.parameters, fused=True)

    @abstractmethod
    def step(self) -> None: ...


class Dense(Way):
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor]) -> None:
        super().__init__([w * m for w, m in zip(weights, masks, strict=True)], gradients)
        self.masks = [mask.float() for mask in masks]

    @torch.no_grad()
    def step(self) -> None:
        for grad, gradient in zip(self.grads, self.gradients, strict=True):
            grad.copy_(gradient)
        self.optimizer.step()
        for master, mask, weight in zip(self.parameters, self.masks, self.weights, strict=True):
            weight.copy_(master.mul_(mask))


class DenseLean(Way):
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor]) -> None:
        own = [gradient.clone() for gradient in gradients]  # they are overwritten
        super().__init__([w * m for w, m in zip(weights, masks, strict=True)], own)
        self.masks = [mask.to(BF16) for mask in masks]

    @torch.no_grad()
    def step(self) -> None:
        for grad, gradient, mask in zip(self.grads, self.gradients, self.masks, strict=True):
            grad.copy_(gradient.mul_(mask))
        self.optimizer.step()
        for master, weight in zip(self.parameters, self.weights, strict=True):
            weight.copy_(master)


class Compact(Way):
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor]) -> None:
        super().__init__([w[m] for w, m in zip(weights, masks, strict=True)], gradients)
        self.patterns = [SparsityPattern(mask) for mask in masks]

    def step(self) -> None:
        for grad, gradient, pattern in zip(self.grads, self.gradients, self.patterns, strict=True):
            kernels.pack(gradient, pattern, out=grad)
        self.optimizer.step()
        for values, pattern, weight in zip(
            self.parameters, self.patterns, self.weights, strict=True
        ):
            kernels.expand(values, pattern, out=weight)


class CompactTorch(Way):
    def __init__(self, weights: list[Tensor], gradients: list[Tensor], masks: list[Tensor]) -> None:
        super().__init__([w[m] for w, m in zip(weights, masks, strict=True)], gradients)
        self.indices = [mask.flatten().nonzero().flatten() for mask in masks]
        self.narrow = [index.int() for index in self.indices]
        self.rounded = [torch.empty_like(p, dtype=BF16) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for grad, gradient, index, rounded in zip(
            self.grads, self.gradients, self.narrow, self.rounded, strict=True
        ):
            grad.copy_(torch.index_select(gradient.view(-1), 0, index, out=rounded))
        self.optimizer.step()
        for values, weight, index, rounded in zip(
            self.parameters, self.weights, self.indices, self.rounded, strict=True
        ):
            weight.zero_().view(-1).index_copy_(0, index, rounded.copy_(values))


def measure(numel: int, repeats: int, seed: int, on_turn: Callable[[], None]) -> list[StepRow]:
    """Step all ways in turn, on whole blocks of about ``numel`` parameters."""
    use(ours()[0])
    generator = torch.Generator().manual_seed(seed)
    width = next((w for w in WIDTHS if 12 * w * w <= numel), WIDTHS[-1])
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    shapes *= max(1, round(numel / (12 * width * width)))
    weights = [0.02 * torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [0.01 * torch.randn(w.shape, generator=generator).to(BF16) for w in weights]
    masks = {f: [torch.rand(w.shape, generator=generator) < f for w in weights] for f in DENSITIES}
    ways = make_ways(weights, gradients, masks)
    for way in ways.values():
        way.step()
    measured = interleave({key: Side(way.step) for key, way in ways.items()}, repeats, on_turn)
    exact = {f: _exact(weights[0], gradients[0], masks[f][0], 1 + repeats) for f in DENSITIES}
    dense, lean = (measured[how, DENSITIES[0]] for how in (DENSE, DENSE_LEAN))
    return [
        StepRow(
            how,
            f,
            sum(w.numel() for w in weights),
            width,
            kernel_timing.median(samples),
            kernel_timing.ratio(samples, dense),
            kernel_timing.ratio(samples, lean),
            not is_near(ways[how, f].weights[0], exact[f]),
            list(samples.values()),
        )
        for (how, f), samples in measured.items()
    ]


def make_ways(
    weights: list[Tensor], gradients: list[Tensor], masks: dict[float, list[Tensor]]
) -> dict[tuple[str, float], Way]:
    """All ways, by name and density; the time of dense ones does not depend on it."""
    first = DENSITIES[0]
    ways: dict[tuple[str, float], Way] = {
        (DENSE, first): Dense(weights, gradients, masks[first]),
        (DENSE_LEAN, first): DenseLean(weights, gradients, masks[first]),
    }
    for f in DENSITIES:
        ways[COMPACT, f] = Compact(weights, gradients, masks[f])
        ways[COMPACT_TORCH, f] = CompactTorch(weights, gradients, masks[f])
    return ways


def is_near(weight: Tensor, exact: Tensor) -> bool:
    """Whether bf16 weights are the exact ones but for rounding."""
    return torch.allclose(weight.float(), exact, rtol=BF16_ULP, atol=NEAR_ZERO)


def _exact(weight: Tensor, gradient: Tensor, mask: Tensor, steps: int) -> Tensor:
    """The weights after some steps, by torch's plainest AdamW in fp64."""
    master = torch.nn.Parameter((weight * mask).double())
    master.grad = (gradient * mask).double()
    optimizer = _adamw([master], fused=False)
    for _ in range(steps):
        optimizer.step()
    return master.detach().to(FP32)
