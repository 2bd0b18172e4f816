"""Magnitude pruning: the entries of smallest absolute value go.

Selection is by radix over the bits of the absolute values, which order like the values themselves.
It is exact, needs no sorted or concatenated copy of the weights, and depends on neither device nor
number of threads, so that ranks that hold equal weights get equal masks. Nor need the weights be in
memory together: ``smallest_pruned`` takes them one at a time, from a model or from its file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_comm.masks import require_data

__all__ = ["loads_of_each", "magnitude", "smallest_pruned"]

_CHUNK = 1 << 20  # entries looked at at a time
_DIGIT = 16  # bits that one pass of the selection settles
_INTEGER = {  # of the same size, as which the bits of a dtype are read
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


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
    that come first are pruned first: by their parameter's name (as Python sorts strings), then
    row-major. Equal weights give equal masks on every rank, device and number of threads, and from
    the model's file (``sparse-comm masks make``). Different dtypes are compared by their exact
    values, infinities are largest, 0.0 and -0.0 equal.

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
    _check(sparsity, scope)
    chosen = _chosen(model, names)
    for name, parameter in chosen.items():
        require_data(name, parameter)
    masks = dict(smallest_pruned(chosen, sparsity, scope, chosen.__getitem__))
    return {name: masks[name] for name in chosen}


def smallest_pruned(
    weights: Mapping[str, Tensor], sparsity: float, scope: str, load: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The masks of ``magnitude``, one at a time, of weights that need not be in memory together.

    At most one weight that ``load`` returned is held at a time, and one mask.

    Args:
        weights: shape and dtype of each weight by name, of floating point; may be meta tensors.
        sparsity: as in ``magnitude``.
        scope: as in ``magnitude``.
        load: returns the weight of a name. Called ``loads_of_each(weights, scope)`` times for each.

    Yields:
        Name and bool mask of each weight, sorted by name, the mask on the loaded weight's device.

    Raises:
        ValueError: as ``magnitude``, when the first mask is asked for; with ``scope="layer"`` a
            NaN is found when its weight's turn comes.

    Source: as ``magnitude``.
    """
    _check(sparsity, scope)
    ordered = {name: weights[name] for name in sorted(weights)}
    if scope == "global":
        yield from _prune_smallest(ordered, sparsity, load)
        return
    for name in ordered:
        held = {name: load(name)}
        yield from _prune_smallest(held, sparsity, held.__getitem__)
        held.clear()  # before the next one is loaded


def loads_of_each(weights: Mapping[str, Tensor], scope: str) -> int:
    """How often ``smallest_pruned`` loads each weight."""
    return 1 if scope == "layer" else _common_dtype(weights).itemsize * 8 // _DIGIT + 1


def _check(sparsity: float, scope: str) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")


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


def _prune_smallest(
    weights: Mapping[str, Tensor], sparsity: float, load: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Masks that prune the smallest entries of all weights together; ties go in their order."""
    common = _common_dtype(weights)
    count = round(sparsity * sum(weight.numel() for weight in weights.values()))
    threshold, ties = _smallest(weights, load, count, common)
    for name in weights:
        mask, ties = _mask(load(name), common, threshold, ties)
        yield name, mask
        del mask  # before the next one is made


def _mask(weight: Tensor, common: torch.dtype, threshold: int, ties: int) -> tuple[Tensor, int]:
    """False where keys are below the threshold or among its first ``ties``; and the ties left."""
    mask = torch.empty(weight.numel(), dtype=torch.bool, device=weight.device)
    for part, keys in zip(mask.split(_CHUNK), _keys(weight, common), strict=True):
        torch.gt(keys, threshold, out=part)
        equal = (keys == threshold).nonzero().flatten()
        part[equal[ties:]] = True
        ties -= min(ties, equal.numel())
    return mask.reshape(weight.shape), ties


def _smallest(
    names: Iterable[str], load: Callable[[str], Tensor], count: int, common: torch.dtype
) -> tuple[int, int]:
    """The key of the count-th smallest entry, and how many entries of that key are up to it."""
    bits = common.itemsize * 8
    prefix, shift = 0, bits
    while shift:
        shift -= _DIGIT
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for name in names:
            for keys in _keys(load(name), common):
                if shift + _DIGIT == bits:
                    _refuse_nan(name, keys, common)
                else:
                    keys = keys[keys >> (shift + _DIGIT) == prefix]
                digits = (keys >> shift) & ((1 << _DIGIT) - 1)
                histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        upto = histogram.cumsum(0)
        digit = int(torch.searchsorted(upto, count))
        count -= int(upto[digit - 1]) if digit else 0
        prefix = prefix << _DIGIT | digit
    return prefix, count


def _refuse_nan(name: str, keys: Tensor, common: torch.dtype) -> None:
    infinity = torch.tensor(torch.inf, dtype=common).view(_INTEGER[common])
    if keys.numel() and keys.max() > int(infinity):
        raise ValueError(f"{name!r} holds NaN, which has no magnitude to compare")


def _common_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """A dtype that represents every entry exactly; the smaller, the fewer passes."""
    dtypes = {weight.dtype for weight in weights.values()}
    if len(dtypes) == 1 and dtypes <= _INTEGER.keys():
        return dtypes.pop()
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _keys(weight: Tensor, common: torch.dtype) -> Iterator[Tensor]:
    """Integers that order like the absolute values, in row-major order, a chunk at a time."""
    flat = weight.detach().reshape(-1)
    integer = _INTEGER[common]
    for part in flat.split(_CHUNK):
        keys = part.to(common).view(integer) & torch.iinfo(integer).max
        yield keys.int() if integer == torch.int16 else keys  # 1 << 16 does not fit 16 bits
