"""Magnitude pruning: the entries of smallest absolute value go.

Selection is by radix over the bits of the absolute values, which order like the values themselves.
It is exact, needs no sorted or concatenated copy of the weights, and depends on neither device nor
number of threads, so that ranks that hold equal weights get equal masks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from sparse_comm.masks import require_data

__all__ = ["magnitude"]

_CHUNK = 1 << 20  # entries looked at at a time
_DIGIT = 16  # bits that one pass of the selection settles
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def magnitude(
    model: nn.Module,
    sparsity: float = 0.9,
    scope: str = "global",
    *,
    names: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
) -> dict[str, Tensor]:
    """Masks that prune the entries of smallest magnitude.

    By default every floating-point parameter of two or more dimensions takes part, embeddings
    included; biases and norm weights, of one dimension, do not. To keep embeddings dense::

        magnitude(model, 0.9, names=lambda name, parameter: "embed" not in name)

    Exactly ``round(sparsity * n)`` of n entries are pruned. Among entries of equal magnitude those
    that come first are pruned first: by the order of ``model.named_parameters()``, then row-major.
    Equal weights give equal masks on every rank, device and number of threads. Different dtypes
    are compared by their exact values, infinities are largest, 0.0 and -0.0 equal.

    Args:
        model: not modified.
        sparsity: fraction of the entries to prune, 0 to 1.
        scope: ``"global"`` ranks the entries of all parameters together, so that layers end with
            different densities; ``"layer"`` prunes the same fraction of each parameter.
        names: which parameters take part: their names, under which parameters of one dimension
            may be given, too; or a predicate over (name, parameter) that picks from the default
            ones.

    Returns:
        Bool masks by name, True where unpruned, of the parameters' shapes, on their devices.
        A tied parameter has one mask, under its first name.

    Raises:
        ValueError: ``sparsity`` or ``scope`` is out of range; a name is unknown or not of a
            floating-point parameter; no parameter is left; weights are NaN or have no data.
        TypeError: ``names`` is a single string.

    Source: Han et al., "Learning both Weights and Connections", NeurIPS 2015; the selection is
    ours.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    chosen = _chosen(model, names)
    for name, parameter in chosen.items():
        require_data(name, parameter)
        if parameter.isnan().any():
            raise ValueError(f"{name!r} holds NaN, which has no magnitude to compare")
    if scope == "global":
        return _prune_smallest(chosen, sparsity)
    masks = {}
    for name, parameter in chosen.items():
        masks.update(_prune_smallest({name: parameter}, sparsity))
    return masks


def _chosen(
    model: nn.Module, names: Iterable[str] | Callable[[str, nn.Parameter], bool] | None
) -> dict[str, nn.Parameter]:
    """The parameters that take part, in the order of ``model.named_parameters()``."""
    floating = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    matrices = {n: p for n, p in floating.items() if p.ndim >= 2}
    if names is None:
        chosen = matrices
    elif callable(names):
        chosen = {n: p for n, p in matrices.items() if names(n, p)}
    else:
        if isinstance(names, str):
            raise TypeError(f"names must be several names or a predicate; write [{names!r}]")
        wanted = {id(_named(model, name)) for name in names}
        chosen = {n: p for n, p in floating.items() if id(p) in wanted}
    if not chosen:
        raise ValueError(
            "no parameter to prune: the model has none of floating point with two or more "
            "dimensions, or names picks none of them"
        )
    return chosen


def _named(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, which may be the second one of a tied parameter."""
    by_name = dict(model.named_parameters(remove_duplicate=False))
    if name not in by_name:
        close = difflib.get_close_matches(str(name), by_name, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"the model has no parameter {name!r}{hint}")
    if not by_name[name].is_floating_point():
        raise ValueError(f"{name!r} has dtype {by_name[name].dtype}; only floating point is pruned")
    return by_name[name]


def _prune_smallest(parameters: dict[str, nn.Parameter], sparsity: float) -> dict[str, Tensor]:
    tensors = list(parameters.values())
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    count = round(sparsity * sum(t.numel() for t in tensors))
    threshold, ties = _smallest(tensors, count, wide) if count else (-1, 0)
    masks = {}
    for name, parameter in parameters.items():
        mask = torch.empty(parameter.numel(), dtype=torch.bool, device=parameter.device)
        for part, keys in zip(mask.split(_CHUNK), _keys(parameter, wide), strict=True):
            torch.gt(keys, threshold, out=part)
            equal = (keys == threshold).nonzero().flatten()
            part[equal[ties:]] = True
            ties -= min(ties, equal.numel())
        masks[name] = mask.reshape(parameter.shape)
    return masks


def _smallest(tensors: list[nn.Parameter], count: int, wide: torch.dtype) -> tuple[int, int]:
    """The key of the count-th smallest entry, and how many entries of that key are up to it."""
    prefix, shift = 0, wide.itemsize * 8
    while shift:
        shift -= _DIGIT
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for tensor in tensors:
            for keys in _keys(tensor, wide):
                if shift + _DIGIT < wide.itemsize * 8:
                    keys = keys[keys >> (shift + _DIGIT) == prefix]
                digits = (keys >> shift) & ((1 << _DIGIT) - 1)
                histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, count))
        count -= int(upto[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return prefix, count


def _keys(tensor: Tensor, wide: torch.dtype) -> Iterator[Tensor]:
    """Integers that order like the absolute values, in row-major order, a chunk at a time."""
    flat = tensor.detach().reshape(-1)
    integer = _INTEGER[wide]
    for part in flat.split(_CHUNK):
        yield part.to(wide).view(integer) & torch.iinfo(integer).max
