"""Structured pruning: whole channels go, with all that reads them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_comm.masks import require_data

from .channel_graph import ChannelGraph, Use

__all__ = ["channels"]

_SIZES = (32, 28, 16, 64, 224, 8)  # of images to try


def channels(
    model: nn.Module, sparsity: float = 0.5, scope: str = "layer", *, example: Any = None
) -> dict[str, Tensor]:
    """Masks that prune the channels of smallest magnitude, with their biases and their readers.

    A channel is an output of a Linear or of a convolution. What must be pruned together goes
    together: channels that a residual adds, query, key and value of an attention head, a channel
    and the norm behind it. Channels that reach the model's output, or an operator that mixes
    channels in a way that is not known here (a LayerNorm among them), stay: of a transformer the
    hidden dimensions of its MLPs and its heads are pruned, not its residual stream.

    The sends of a pipeline that is cut at such channels need the others only
    (``pipeline_codec="channels"``).

    Args:
        model: not modified. It is run once, on ``example``, without gradients.
        sparsity: fraction of the channels to prune, 0 to 1. At least one of each layer stays.
        scope: ``"layer"`` prunes the same fraction of each layer (of layers whose channels belong
            together: of them together); ``"global"`` ranks all by the mean square of a channel's
            weights.
        example: an input, or a tuple of them; if not given one is made up for the first layer.

    Returns:
        Bool masks by name, True where unpruned, of the parameters that have pruned channels, on
        their devices.

    Raises:
        ValueError: ``sparsity`` or ``scope`` is out of range; no example was given and none could
            be made up; nothing can be pruned.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (there by L1 norm);
    Michel et al., NeurIPS 2019, prune heads; how channels are followed is ours.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        require_data(name, parameter)
    graph = _followed(model, example)
    of_channel, protected = graph.classes()
    sizes, layers = _sizes(graph, of_channel, len(protected), named)
    pruned = np.zeros(len(protected), bool)
    for members in _ranked_together(layers, protected, scope):
        smallest = members[np.argsort(sizes[members], kind="stable")]
        pruned[smallest[: round(sparsity * len(members))]] = True
    _keep_one(layers, pruned, sizes)
    masks: dict[str, Tensor] = {}
    for use in graph.uses:
        if id(use.parameter) not in named:  # a weight that the model computes
            continue
        name = named[id(use.parameter)]
        gone = (use.channels >= 0) & pruned[of_channel[np.maximum(use.channels, 0)]]
        if gone.any():
            kept = torch.from_numpy(~gone).to(use.parameter.device).expand(use.parameter.shape)
            masks[name] = masks[name] & kept if name in masks else kept.clone()
    if protected.all():
        raise ValueError(
            "no channel of the model can be pruned: all of them reach its output, or operators "
            "that mix channels"
        )
    return {name: masks[name] for name, _ in model.named_parameters() if name in masks}


def _followed(model: nn.Module, example: Any) -> ChannelGraph:
    training = {module: module.training for module in model.modules()}
    failures = []
    try:
        model.eval()
        for inputs in [example] if example is not None else _made_up(model):
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            graph = ChannelGraph()
            try:
                with torch.no_grad(), graph:
                    output = model(*copy.copy(given))
                graph.protect(output)
                return graph
            except Exception as error:
                if example is not None:
                    raise
                failures.append(f"{[tuple(t.shape) for t in given]}: {error}")
    finally:
        for module, was in training.items():
            module.training = was
    tried = "; ".join(failures) or "its first layer is none that is known here"
    raise ValueError(f"give example=, an input of the model; none could be made up ({tried})")


def _made_up(model: nn.Module) -> Iterator[Tensor]:
    """Inputs that may suit the first layer."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            yield torch.zeros(1, 8, dtype=torch.int64, device=layer.weight.device)
            return
        if isinstance(layer, nn.Linear):
            for shape in ((2, layer.in_features), (2, 8, layer.in_features)):
                yield layer.weight.new_zeros(shape)
            return
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            for size in _SIZES:
                image = [size] * (layer.weight.ndim - 2)
                yield layer.weight.new_zeros((1, layer.in_channels, *image))
            return


def _sizes(
    graph: ChannelGraph, of_channel: np.ndarray, count: int, named: dict[int, str]
) -> tuple[np.ndarray, list[frozenset[str]]]:
    """Of each class the mean square of the weights that write it, and the names of these."""
    squares, weights = np.zeros(count), np.zeros(count)
    layers: list[set[str]] = [set() for _ in range(count)]
    for use in _scoring(graph.uses):
        name = named.get(id(use.parameter))
        numbers = use.channels.reshape(-1)
        dim = int(np.argmax(use.channels.shape))
        rows = use.parameter.detach().double().movedim(dim, 0).flatten(1)
        np.add.at(squares, of_channel[numbers], rows.square().sum(1).cpu().numpy())
        np.add.at(weights, of_channel[numbers], rows.shape[1])
        for one in np.unique(of_channel[numbers]):
            layers[one].add(name or "")
    return squares / np.maximum(weights, 1), [frozenset(names) for names in layers]


def _scoring(uses: Sequence[Use]) -> Iterator[Use]:
    seen = set()
    for use in uses:
        if use.scores and id(use.parameter) not in seen:
            seen.add(id(use.parameter))
            yield use


def _ranked_together(
    layers: Sequence[frozenset[str]], protected: np.ndarray, scope: str
) -> list[np.ndarray]:
    groups: dict[frozenset[str], list[int]] = {}
    for number, names in enumerate(layers):
        if not protected[number] and names and "" not in names:
            groups.setdefault(names if scope == "layer" else frozenset(), []).append(number)
    return [np.array(members) for members in groups.values()]


def _keep_one(layers: Sequence[frozenset[str]], pruned: np.ndarray, sizes: np.ndarray) -> None:
    """The largest class of a layer stays where all would go."""
    of_layer: dict[str, list[int]] = {}
    for number, names in enumerate(layers):
        for name in names:
            of_layer.setdefault(name, []).append(number)
    for members in of_layer.values():
        if all(pruned[member] for member in members):
            pruned[max(members, key=lambda member: sizes[member])] = False
