"""Small models, masks, and the training that compact and masked dense models are compared by.

The dense side of every comparison is *masked dense training*: an ordinary model whose pruned
weights are zeroed at the start and after each step, and its gradients before.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_comm

Masks = dict[str, Tensor]
CLASSES = 7


def mlp() -> nn.Module:
    """Odd sizes: vectorized loops end in the middle of every tensor."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(33, 65), nn.GELU(), nn.Linear(65, 65), nn.LayerNorm(65), nn.Linear(65, CLASSES)
    )


class ConvNet(nn.Module):
    """Convolutions, one of them grouped, with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 9, 3, padding=1),
            nn.BatchNorm2d(9),
            nn.ReLU(),
            nn.Conv2d(9, 9, 3, padding=1, groups=3),
            nn.BatchNorm2d(9),
            nn.ReLU(),
        )
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.reshape(-1, 3, 1, 11)).mean((-1, -2)))


class Tied(nn.Module):
    """An input and an output layer that are one parameter, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(33, 17)
        self.middle = nn.Linear(17, 17, bias=False)
        self.out = nn.Linear(33, 17, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(F.gelu(self.embed(x)))
        return F.linear(self.out(x) + hidden, self.out.weight.T)[..., :CLASSES]


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(33, 33)
        self.head = nn.Linear(33, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.layer(F.gelu(self.layer(x)))))


def seeded(model_class: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model_class()


def random_masks(model: nn.Module, density: float = 0.3, seed: int = 1) -> Masks:
    """Masks of all matrices and filters; those of tied parameters once."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(parameter.shape, generator=generator) < density
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


def same_nnz_masks(masks: Mapping[str, Tensor]) -> Masks:
    """Other masks with as many unpruned entries in each parameter."""
    return {name: mask.flatten().roll(1).reshape(mask.shape) for name, mask in masks.items()}


def zero_pruned_(model: nn.Module, masks: Mapping[str, Tensor], gradients: bool = False) -> None:
    """Multiply the weights of a dense model by their masks, or their gradients."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (mask := masks.get(name.removeprefix("module."))) is not None:
                if not gradients:
                    parameter.mul_(mask)
                elif parameter.grad is not None:
                    parameter.grad.mul_(mask)


def pair(
    make: Callable[[], nn.Module] = mlp, masks: Masks | None = None, **options: Any
) -> tuple[nn.Module, nn.Module, Masks]:
    """(masked dense model, compact model, masks), of the same weights."""
    dense = make()
    masks = random_masks(dense) if masks is None else masks
    zero_pruned_(dense, masks)
    compact = sparse_comm.compact(copy.deepcopy(dense), masks, **options)
    return dense, compact, masks


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs, and which of the first is the largest, to be learnt.

    Uniform numbers, which are the same on every machine.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(size, 33, generator=generator) * 2 - 1
    return x, x[:, :CLASSES].argmax(1)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masks: Mapping[str, Tensor] | None = None,
    steps: int = 50,
    first: int = 0,
    clip: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    autocast: bool = False,
    dtype: torch.dtype = torch.float32,
    forward: Callable[[Tensor], Tensor] | None = None,
    after_step: Callable[[], Any] | None = None,
    seed: int = 100,
) -> list[float]:
    """Train for ``steps`` steps from number ``first`` on; returns the losses.

    Args:
        model: dense or compact.
        optimizer: on its parameters.
        masks: of the dense side: its weights are masked after each step, and its gradients before.
        steps: optimizer steps.
        first: number of the first step, which picks the data.
        clip: called with the parameters before each step.
        accumulate: batches a step.
        autocast: run forward under bf16 autocast.
        dtype: of the inputs.
        forward: called in place of the model (compiled, wrapped).
        after_step: called after each step (a learning-rate scheduler).
        seed: of the data.
    """
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch(seed + step * accumulate + part)
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                out = (model if forward is None else forward)(x.to(dtype))
            loss = F.cross_entropy(out.float(), y) / accumulate
            loss.backward()
            losses.append(loss.item())
        if masks is not None:
            zero_pruned_(model, masks, gradients=True)
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
        if masks is not None:
            zero_pruned_(model, masks)
        if after_step is not None:
            after_step()
    return losses


def same_state(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two state dicts have the same names, in order, and tensors of the same bits."""
    return list(a) == list(b) and all(same_bits(a[name], b[name]) for name in a)


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor):
        return a == b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def same_weights(dense: nn.Module, compact: nn.Module) -> bool:
    """Whether the compact model stands for the same bits as the dense one."""
    return same_state(dense.state_dict(), sparse_comm.dense_state_dict(compact))


def same_optimizer_state(
    dense: tuple[nn.Module, torch.optim.Optimizer], compact: tuple[nn.Module, torch.optim.Optimizer]
) -> bool:
    """Whether the compact optimizer's state is the dense one's, packed, bit for bit."""
    masks = sparse_comm.masks_of(compact[0])
    others = dict(compact[0].named_parameters())
    for name, parameter in dense[0].named_parameters():
        ours, theirs = compact[1].state[others[name]], dense[1].state[parameter]
        if set(ours) != set(theirs):
            return False
        for key, value in theirs.items():
            if name in masks and isinstance(value, Tensor) and value.shape == parameter.shape:
                value = value[masks[name]]
            if not same_bits(ours[key], value):
                return False
    return True


def pruned_are_zero(model: nn.Module) -> bool:
    """Whether each compact parameter's dense weight is exactly zero where it is pruned."""
    state = sparse_comm.dense_state_dict(model)
    return all(
        bool((model.get_parameter(name)[~mask] == 0).all() and (state[name][~mask] == 0).all())
        for name, mask in sparse_comm.masks_of(model).items()
    )


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Any]:
    """All that a refusal must leave as it was: tensors by ``id`` and contents, classes, groups."""
    seen: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        seen += [name, type(module), list(module.__dict__)]
        for kind in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, kind).items():
                seen += [key, id(tensor), type(tensor), _contents(tensor)]
                if tensor is not None:
                    seen += [tensor.requires_grad, list(tensor.__dict__), _contents(tensor.grad)]
    if optimizer is not None:
        for group in optimizer.param_groups:
            seen += [
                [id(p) for p in group["params"]],
                {k: group[k] for k in group if k != "params"},
            ]
        for parameter, state in optimizer.state.items():
            seen += [id(parameter), [(k, _contents(v)) for k, v in state.items()]]
    return seen


def _contents(value: Any) -> Any:
    if not isinstance(value, Tensor) or nn.parameter.is_lazy(value):
        return repr(value)
    if value.is_quantized or value.layout != torch.strided:
        return repr(value)
    return value.dtype, value.shape, value.detach().contiguous().flatten().tolist()
