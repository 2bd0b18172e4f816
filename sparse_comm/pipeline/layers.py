"""Which channels of a boundary the layers next to it read, and which they leave zero.

Only the masks of those layers are looked at: of the first Linear or convolution after the boundary,
and of the last one before it, with what stands between and keeps channels apart. Anything else
counts as reading every channel, and as writing something to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

__all__ = ["OwnHook", "Side", "hides_its_end", "layers_of", "read_channels", "written_channels"]

_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU),
    *(nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softplus, nn.Softsign),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold, nn.Tanhshrink),
)
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold)
READERS = (nn.Linear, *_CONVOLUTIONS)  # layers whose masks decide
_APART = (*_ELEMENTWISE, *_DROPOUT, *_POOLS, *_NORMS, *_INSTANCE)  # channels stay apart


@dataclass(frozen=True)
class Side:
    """What one stage makes of the channels of a boundary.

    Attributes:
        dim: that of the channels, 1 or -1.
        flat: whether, on this side, they are flattened with what follows them.
        needed: 1-D, bool, by channel (by feature, of the reader if ``flat``): whether it is read,
            or written with something else than zeros.
        layer: name of the layer whose mask decides.
    """

    dim: int
    flat: bool
    needed: Tensor
    layer: str


def layers_of(stage: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers of a stage in their order, with names; one alone if they are not in a row.

    ``nn.Sequential``, nested or subclassed, is a row as long as its ``forward`` is its own, and so
    are the layers of DeepSpeed's ``PipelineModule``.
    """
    yield from _flattened("", stage)


def _flattened(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    prefix = f"{name}." if name else ""
    if type(module).forward is nn.Sequential.forward and not _is_changed(module):
        for child, layer in module._modules.items():  # one that is used twice comes twice
            assert layer is not None
            yield from _flattened(prefix + child, layer)
    elif isinstance(row := _row_of_pipeline(module), list) and not name:
        paths = {id(layer): path for path, layer in module.named_modules()}
        for function in row:
            if isinstance(function, nn.Module):
                yield from _flattened(paths.get(id(function), ""), function)
            else:
                yield "", _Unknown()
    else:
        yield name, module


def _row_of_pipeline(module: nn.Module) -> Any:
    # DeepSpeed's engines have hooks there, which time and cast.
    return None if _is_changed(module, "deepspeed.") else getattr(module, "forward_funcs", None)


class _Unknown(nn.Module):
    """A function among a pipeline's layers."""


def _is_changed(module: nn.Module, but_by: str | None = None) -> bool:
    """Whether it does something else than its class, or may; but for hooks of one package."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    others = [h for kind in hooks for h in kind.values() if not isinstance(h, OwnHook)]
    if but_by is not None:
        others = [h for h in others if not str(getattr(h, "__module__", "")).startswith(but_by)]
    everywhere = torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks
    return bool(others or everywhere) or "forward" in vars(module)


class OwnHook:
    """One of this package: a layer that has no others computes what its class does.

    A copy of a stage, of an EMA say, is none of the pipeline: its hooks do nothing.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnHook, ()

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> Any:
        """Change nothing."""
        return None


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it computes what one of the classes does."""
    found = next((kind for kind in kinds if isinstance(module, kind)), None)
    return found is not None and type(module).forward is found.forward and not _is_changed(module)


def hides_its_end(stage: nn.Module) -> bool:
    """Whether a stage ends in a ReLU and layers behind it that give what is between to nobody."""
    for _, layer in reversed(list(layers_of(stage))):
        if _is(layer, _RECTIFIERS):
            return True
        if not _is(layer, (nn.Identity, nn.Flatten, *_DROPOUT, *_POOLS)):
            return False
    return False


def read_channels(
    layers: Iterable[tuple[str, nn.Module]], masks: Mapping[str, Tensor]
) -> Side | None:
    """What the first layer with weights after a boundary reads; None if that may be everything.

    Args:
        layers: from the boundary on.
        masks: by the names of the layers' parameters.
    """
    flat, by_dimension = False, False  # whether a layer before looks at dimension 1 as channels
    for name, layer in layers:
        if _is(layer, (nn.Flatten,)):
            if flat or layer.start_dim != 1 or layer.end_dim != -1:
                return None
            flat = True
        elif _is(layer, (nn.Linear,)):
            mask = _mask(masks, name, "weight")
            if mask is None or (by_dimension and not flat):
                return None
            return Side(1 if flat else -1, flat, mask.any(0), name)
        elif _is(layer, _CONVOLUTIONS):
            mask = _mask(masks, name, "weight")
            if mask is None or flat:
                return None
            by_group = mask.flatten(2).any(2).unflatten(0, (layer.groups, -1))
            return Side(1, False, by_group.any(1).flatten(), name)
        elif not _is(layer, _APART):
            return None
        elif not _is(layer, (*_ELEMENTWISE, *_DROPOUT)):
            by_dimension = True
    return None


def written_channels(
    layers: Iterable[tuple[str, nn.Module]], masks: Mapping[str, Tensor]
) -> Side | None:
    """Which channels the masks before a boundary make zero; None if that may be none.

    Args:
        layers: up to the boundary.
        masks: by the names of the layers' parameters.
    """
    after: list[nn.Module] = []
    for name, layer in reversed(list(layers)):
        if _is(layer, READERS):
            mask = _mask(masks, name, "weight")
            needed = None if mask is None else mask.flatten(1).any(1)
            dim = -1 if isinstance(layer, nn.Linear) else 1
            return _written(name, layer, needed, dim, masks, after)
        if _is(layer, _NORMS):
            mask = _mask(masks, name, "weight")  # not of fewer dimensions than the channels
            return _written(name, layer, None if mask is None else mask, 1, masks, after)
        if not _is(layer, (nn.Flatten, *_ELEMENTWISE, *_DROPOUT, *_POOLS)):
            return None
        after.append(layer)
    return None


def _written(
    name: str,
    layer: nn.Module,
    needed: Tensor | None,
    dim: int,
    masks: Mapping[str, Tensor],
    after: list[nn.Module],
) -> Side | None:
    if needed is None:
        return None
    if getattr(layer, "bias", None) is not None:
        mask = _mask(masks, name, "bias")
        needed = needed | mask if mask is not None else torch.ones_like(needed)
    flat = False
    for module in reversed(after):
        if isinstance(module, nn.Flatten):
            if flat or module.start_dim != 1 or module.end_dim != -1 or dim != 1:
                return None
            flat = True
        elif (dim == -1 and _is(module, _POOLS)) or not _keeps_zero(module):  # over the channels
            return None
    return Side(-1 if flat else dim, flat, needed, name)


def _keeps_zero(module: nn.Module) -> bool:
    if not _is(module, _ELEMENTWISE):
        return True  # pools, with padding, and dropout
    with torch.no_grad():
        weight = next(module.parameters(), torch.zeros(()))
        return not module(weight.new_zeros((1, max(weight.numel(), 1)))).any()


def _mask(masks: Mapping[str, Tensor], layer: str, of: str) -> Tensor | None:
    found = masks.get(f"{layer}.{of}" if layer else of)
    return None if found is None else found.cpu()
