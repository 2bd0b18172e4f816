"""AxoNN's tensor-parallel layers: how they cut a weight, and over which ranks its gradient counts.

A layer's weight here is the 1-D tensor of this rank's part. Ranks of a stage form a grid of rows,
columns and depths, besides the replicas (data). Who sees which part of the batch decides how
gradients are averaged:

- layers in *expert mode* see the same part on all ranks of one replica and depth;
- other ``Linear`` layers, those of ``auto_parallelize()``, take whatever part each rank has, and
  send it around: each rank may have its own, and counts as a replica;
- ``Conv2d`` takes the same batch on all ranks of a replica, and spreads it over the depths itself
  (unless it is called with ``scatter_input=False``, which is refused where that matters);
- ``Embedding`` looks up the same part on all rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .modules import ax, config, fully_connected, intra_communication, intra_layer
from .modules import embedding as embedding_module

__all__ = ["Axes", "averaging", "cut", "full_shape", "layers_of", "refuse_unscattered", "whole"]

Axes = frozenset[str]

_LAYERS = (intra_layer.Linear, intra_layer.Conv2d, intra_layer.Embedding)
_GRID = frozenset(("depth", "row", "column"))


def layers_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of each tensor-parallel layer."""
    for path, module in model.named_modules():
        if isinstance(module, _LAYERS):
            yield path, module


def averaging(model: nn.Module, own_batches: bool = False) -> dict[str, tuple[Axes, int]]:
    """By parameter name: axes over whose ranks its gradients are summed, and the divisor.

    Names are those of ``named_parameters()``, tied ones once.

    Args:
        model: with or without parallel layers.
        own_batches: whether each rank has its own part of the batch, also where no layer says so.

    Raises:
        ValueError: layers of which some have, and others have not.
    """
    _refuse_mixed(model)
    sizes = {
        "data": config.G_data,
        "depth": config.G_intra_d,
        "row": config.G_intra_r,
        "column": config.G_intra_c,
    }

    def mean(*axes: str, summed_already: tuple[str, ...] = ()) -> tuple[Axes, int]:
        return frozenset(axes), math.prod(sizes[name] for name in (*axes, *summed_already))

    own: dict[int, tuple[Axes, int]] = {}
    batch_is_shared = not own_batches  # by all rows and columns, as far as the layers say
    for _, layer in layers_of(model):
        inner = "column" if _has_rows_outside(layer) else "row"
        if isinstance(layer, intra_layer.Conv2d):
            weight = bias = mean("data")
        elif layer.expert_mode or isinstance(layer, intra_layer.Embedding):
            weight = mean("data", summed_already=("depth",))
            bias = mean("data", "depth")
        else:
            weight = mean("data", summed_already=("depth", "row", "column"))
            # The gather sums over those that hold the other parts, in its backward pass.
            bias = mean("data", "depth", inner)[0], math.prod(sizes.values())
            batch_is_shared = False
        parameters = layer._parameters
        own[id(parameters["weight"])] = weight
        if parameters.get("bias") is not None:
            own[id(parameters["bias"])] = bias
    others = mean("data", "depth") if batch_is_shared else mean(*sizes)
    return {name: own.get(id(parameter), others) for name, parameter in model.named_parameters()}


def _refuse_mixed(model: nn.Module) -> None:
    if config.G_intra_r * config.G_intra_c == 1:
        return
    modes = {
        bool(layer.expert_mode)
        for _, layer in layers_of(model)
        if isinstance(layer, intra_layer.Linear)
    }
    if len(modes) == 2:
        raise ValueError(
            "the model has AxoNN's Linear layers in expert mode and others: parameters between the "
            "first may be split over rows and columns, between the others they are not, and "
            "nothing tells them apart. Use one kind"
        )


def _has_rows_outside(layer: Any) -> bool:
    """Whether the layer's rows are split over the grid's rows: it is not transposed."""
    outer = ax.comm_handle.outer_intra_layer_parallel_group
    inner = ax.comm_handle.inner_intra_layer_parallel_group
    ranks = dist.get_process_group_ranks(layer.outer_group)
    if dist.get_process_group_ranks(outer) == dist.get_process_group_ranks(inner):
        return True  # a grid of one row and one column
    return ranks == dist.get_process_group_ranks(outer)


def refuse_unscattered(model: nn.Module) -> None:
    """Let convolutions whose depths have different parts of the batch raise: see ``averaging``."""

    def check(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scatters = kwargs.get("scatter_input", args[1] if len(args) > 1 else True)
        if not scatters and config.G_intra_d > 1:
            raise ValueError(
                "Conv2d was called with scatter_input=False on a grid of several depths: its "
                "gradients would be averaged as if all depths had the same batch. Leave the "
                "argument out, or use G_intra_d=1"
            )

    for _, layer in layers_of(model):
        if isinstance(layer, intra_layer.Conv2d):
            layer.register_forward_pre_hook(check, with_kwargs=True)


def full_shape(layer: Any, name: str) -> torch.Size:
    """Of the parameter in the layer that is not parallel."""
    if isinstance(layer, intra_layer.Linear):
        weight: tuple[int, ...] = (layer.out_features, layer.in_features)
    elif isinstance(layer, intra_layer.Embedding):
        weight = (layer.num_embeddings, layer.embedding_dim)
    else:
        out = layer.local_out_channels * layer.outer_group_size
        into = layer.local_in_channels * layer.inner_group_size
        weight = (out, into, layer.kernel_size, layer.kernel_size)
    return torch.Size(weight if name == "weight" else weight[:1])


@torch.no_grad()
def cut(layer: Any, name: str, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of the parameter's full shape, as AxoNN cuts it.

    Args:
        layer: tensor-parallel.
        name: of its parameter, "weight" or "bias".
        tensor: of ``full_shape(layer, name)``, any dtype.

    Returns:
        1-D tensor of its own memory.
    """
    drop = intra_communication.Drop.apply
    if name == "bias":
        part = drop(tensor, layer.outer_group, 0)
    elif isinstance(layer, intra_layer.Linear):
        part = fully_connected.extract_local_params_from_full_params(
            tensor, layer.outer_group, layer.inner_group, layer.depth_group
        )
    elif isinstance(layer, intra_layer.Embedding):
        out, into = layer.outer_group, layer.inner_group
        if layer.transpose:
            out, into = into, out
        part = embedding_module.extract_local_params_from_full_params(
            tensor, out, into, layer.depth_group
        )
    else:
        part = drop(drop(tensor, layer.outer_group, 0), layer.inner_group, 1)
        part = drop(part.reshape(-1), layer.depth_group)
    return part.clone()


@torch.no_grad()
def whole(layer: Any, name: str, part: Tensor) -> Tensor:
    """The tensor of full shape of which the ranks have parts. A collective of the stage's ranks.

    Args:
        layer: tensor-parallel.
        name: of its parameter, "weight" or "bias".
        part: as from ``cut``.
    """
    out_group, in_group = layer.outer_group, layer.inner_group
    if name == "bias":
        return _gathered(part, 0, out_group)
    shape = list(full_shape(layer, name))
    out_dim, in_dim = 0, 1
    if isinstance(layer, intra_layer.Embedding):
        out_dim, in_dim = 1, 0
        if layer.transpose:
            out_group, in_group = in_group, out_group
    shape[out_dim] //= dist.get_world_size(out_group)
    shape[in_dim] //= dist.get_world_size(in_group)
    local = _gathered(part, 0, layer.depth_group).reshape(shape)
    return _gathered(_gathered(local, in_dim, in_group), out_dim, out_group)


def _gathered(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.cat(parts, dim)
