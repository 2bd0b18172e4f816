"""Checkpoints by the names of the whole model, to be resumed on any other grid of ranks.

A folder: torch.distributed.checkpoint's files, with each parameter once and whole, of masked ones
the values; ``masks.safetensors``; and ``training.json``, the optimizer's options and what else is
not a tensor.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sparse_comm import kernels
from sparse_comm.compact.convert import patterns_of, values_changed
from sparse_comm.mask_file import load_patterns, save_masks
from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pattern import SparsityPattern

from .layers import cut, full_shape, layers_of, whole
from .modules import config

if TYPE_CHECKING:
    from .engine import InterLayerEngine

__all__ = ["load_checkpoint", "save_checkpoint"]

_MASKS, _TRAINING = "masks.safetensors", "training.json"


class _Held:
    """One parameter of this rank: its name in the whole model, and its way there and back.

    Args:
        name: in the whole model.
        parameter: values, or dense.
        pattern: of this rank's part; None if it is dense.
        layer: the tensor-parallel layer that it is of; None if it is whole here.
        attribute: its name in the layer.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        pattern: SparsityPattern | None,
        layer: Any,
        attribute: str,
    ) -> None:
        self.name, self.parameter, self.pattern = name, parameter, pattern
        self._layer, self._attribute = layer, attribute

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of it."""
        return self._layer is None

    def whole_pattern(self) -> SparsityPattern | None:
        """The whole parameter's pattern. A collective of the stage's ranks, if it is in parts."""
        if self.pattern is None or self._layer is None:
            return self.pattern
        part = self.pattern.to_mask().to(torch.uint8)
        return SparsityPattern(whole(self._layer, self._attribute, part).bool())

    def whole(self, tensor: Tensor, pattern: SparsityPattern | None) -> Tensor:
        """What is saved of a tensor like the parameter. A collective, as above."""
        if self._layer is None:
            return tensor
        dense = tensor if self.pattern is None else kernels.expand(tensor, self.pattern)
        together = whole(self._layer, self._attribute, dense)
        return together if pattern is None else kernels.pack(together, pattern.to(tensor.device))

    def part(self, saved: Tensor, pattern: SparsityPattern | None) -> Tensor:
        """What this rank holds of a tensor that was saved with a pattern, or dense."""
        saved = saved.to(self.parameter.device)
        if self._layer is None and pattern == self.pattern:
            return saved
        if pattern is not None:
            saved = kernels.expand(saved, pattern.to(saved.device))
        dense = saved
        if self._layer is not None and dense.shape == full_shape(self._layer, self._attribute):
            dense = cut(self._layer, self._attribute, dense)
        return dense if self.pattern is None else kernels.pack(dense, self.pattern)

    def saved_shape(self, pattern: SparsityPattern | None) -> torch.Size:
        """What a checkpoint has of it, saved with a pattern, or dense."""
        if pattern is not None:
            return torch.Size((pattern.nnz,))
        if self._layer is not None:
            return full_shape(self._layer, self._attribute)
        return self.parameter.shape if self.pattern is None else torch.Size(self.pattern.shape)

    def fits(self, pattern: SparsityPattern | None) -> bool:
        """Whether the pattern with which it was saved is this one, as far as this rank goes."""
        if pattern is None or self.pattern is None:
            return True
        if self._layer is not None and pattern.shape != full_shape(self._layer, self._attribute):
            return False
        if self._layer is None:
            return pattern == self.pattern
        return SparsityPattern(cut(self._layer, self._attribute, pattern.to_mask())) == self.pattern


def save_checkpoint(
    engine: InterLayerEngine,
    optimizer: torch.optim.Optimizer,
    path: str | os.PathLike[str],
    extra: Any = None,
) -> None:
    """See ``InterLayerEngine.save_checkpoint``."""
    folder = Path(path)
    held = on_all_ranks(lambda: list(_held(engine)))
    on_all_ranks(lambda: json.dumps([extra, [_options(g) for g in optimizer.param_groups]]))
    _check_names(engine, held)
    _check_shared(held)
    state: dict[str, Tensor] = {}
    masks: dict[str, SparsityPattern] = {}
    options: dict[str, dict[str, Any]] = {}
    for one in held:
        pattern = one.whole_pattern()
        if pattern is not None:
            masks[one.name] = pattern
        state[f"model.{one.name}"] = one.whole(one.parameter.detach(), pattern)
        for key, value in optimizer.state.get(one.parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == one.parameter.shape:
                value = one.whole(value, pattern)
            state[f"optimizer.{one.name}.{key}"] = torch.as_tensor(value)
    for name, buffer in _buffers(engine):
        state[f"model.{name}"] = buffer
    names = {id(one.parameter): one.name for one in held}
    for group in optimizer.param_groups:
        own = _options(group)
        options |= {names[id(p)]: own for p in group["params"] if id(p) in names}
    on_all_ranks(lambda: _prepare(folder))
    # Replicas hold the same, but for statistics of their own batches: those of the first count.
    counts = config.data_parallel_rank == config.intra_layer_parallel_rank == 0
    dcp.save(state if counts else {}, checkpoint_id=folder)
    mine = (masks if counts else {}, options)
    said: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, said if dist.get_rank() == 0 else None)

    def write() -> None:
        if dist.get_rank() != 0:
            return
        all_masks: dict[str, SparsityPattern] = {}
        all_options: dict[str, Any] = {}
        for own_masks, own_options in said:
            all_masks |= own_masks
            all_options |= own_options
        save_masks(all_masks, folder / _MASKS)
        training = {
            "format": 1,
            "optimizer": all_options,
            "loss_scale": vars(engine.scaler),
            "extra": extra,
        }
        (folder / _TRAINING).write_text(json.dumps(training, indent=1))

    on_all_ranks(write)


def _prepare(folder: Path) -> None:
    """Take away what is saved here already; first what makes it a checkpoint."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (folder / _TRAINING, folder / ".metadata", *folder.glob("*.distcp")):
            file.unlink(missing_ok=True)


def load_checkpoint(
    engine: InterLayerEngine,
    optimizer: torch.optim.Optimizer | None,
    path: str | os.PathLike[str],
) -> Any:
    """See ``InterLayerEngine.load_checkpoint``."""
    folder = Path(path)
    training, masks = on_all_ranks(lambda: _read(folder))
    reader = dcp.FileSystemReader(folder)
    saved = on_all_ranks(lambda: reader.read_metadata().state_dict_metadata)
    held = on_all_ranks(lambda: list(_held(engine)))
    on_all_ranks(lambda: _check(engine, held, saved, masks))
    wanted = {one.name: _saved_name(engine, one.name, saved) for one in held}
    keys = {f"model.{there}" for there in wanted.values()}
    keys |= {f"model.{name}" for name, _ in _buffers(engine)}
    if optimizer is not None:
        prefixes = tuple(f"optimizer.{there}." for there in wanted.values())
        keys |= {key for key in saved if key.startswith(prefixes)}
    state = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key in sorted(keys)
        if isinstance(meta := saved[key], TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader)
    with torch.no_grad():
        for one in held:
            there = wanted[one.name]
            pattern = masks.get(there)
            one.parameter.copy_(one.part(state[f"model.{there}"], pattern))
            if optimizer is not None:
                _load_state(one, f"optimizer.{there}.", state, pattern, optimizer)
        for name, buffer in _buffers(engine):
            buffer.copy_(state[f"model.{name}"])
    values_changed(engine.model)
    if optimizer is not None:
        options = training["optimizer"]
        on_all_ranks(lambda: _load_options(optimizer, held, wanted, options))
    for name, value in training["loss_scale"].items():
        setattr(engine.scaler, name, value)
    return training["extra"]


def _held(engine: InterLayerEngine) -> Iterator[_Held]:
    """This rank's parameters, tied ones once."""
    layers = dict(layers_of(engine.model))
    patterns = patterns_of(engine.model)
    for local, parameter in engine.model.named_parameters():
        path, _, attribute = local.rpartition(".")
        yield _Held(
            engine.names[local], parameter, patterns.get(local), layers.get(path), attribute
        )


def _buffers(engine: InterLayerEngine) -> list[tuple[str, Tensor]]:
    persistent = engine.model.state_dict(keep_vars=True)
    return [
        (engine.names[local], buffer)
        for local, buffer in engine.model.named_buffers()
        if local in persistent
    ]


def _check_names(engine: InterLayerEngine, held: list[_Held]) -> None:
    """Refuse stages that use the same names for different parameters. A collective."""
    names = [*(one.name for one in held), *(name for name, _ in _buffers(engine))]
    mine = (config.inter_layer_parallel_rank, names)
    stage_of: dict[str, int] = {}
    twice = [
        name
        for stage, names in gather(mine)
        for name in names
        if stage_of.setdefault(name, stage) != stage
    ]

    def check() -> None:
        if twice:
            raise ValueError(
                f"two stages have a parameter or buffer {twice[0]!r}: give InterLayerEngine(…, "
                "names=…) what makes the names of the whole model of them, by which checkpoints go"
            )

    on_all_ranks(check)


def _check_shared(held: list[_Held]) -> None:
    """Refuse parameters that a user has split over the ranks of a stage by hand. A collective."""
    if config.G_intra == 1:
        return
    mine: dict[str, int] = {}
    if config.data_parallel_rank == 0:
        for one in held:
            if one.is_whole:
                own = one.parameter.detach().cpu().reshape(-1).view(torch.uint8)
                mine[one.name] = zlib.crc32(own.numpy().tobytes())
    known: dict[str, int] = {}
    split = [
        name
        for said in gather(mine)
        for name, checksum in said.items()
        if known.setdefault(name, checksum) != checksum
    ]

    def check() -> None:
        if split:
            raise ValueError(
                f"ranks of one stage hold different values of {split[0]!r}, which is no parameter "
                "of AxoNN's layers: how they fit together is not known here. Save what each rank "
                "holds, torch.save(engine.model.state_dict(), …)"
            )

    on_all_ranks(check)


def _saved_name(engine: InterLayerEngine, name: str, saved: Mapping[str, Any]) -> str:
    """The name that it was saved under: of tied ones, a model in one piece has one only."""
    if f"model.{name}" not in saved and engine.tied is not None and name in engine.tied.names:
        return next((n for n in engine.tied.names if f"model.{n}" in saved), name)
    return name


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, SparsityPattern]]:
    if not (folder / _TRAINING).exists():
        raise FileNotFoundError(
            f"{str(folder)!r} holds no {_TRAINING}: it is no checkpoint of an InterLayerEngine, or "
            "its saving was broken off"
        )
    masks = load_patterns(folder / _MASKS)
    training: dict[str, Any] = json.loads((folder / _TRAINING).read_text())
    return training, masks


def _check(
    engine: InterLayerEngine,
    held: list[_Held],
    saved: Mapping[str, Any],
    masks: Mapping[str, SparsityPattern],
) -> None:
    """Refuse, before anything is loaded, what does not fit."""
    shapes = {name: buffer.shape for name, buffer in _buffers(engine)}
    for one in held:
        there = _saved_name(engine, one.name, saved)
        shapes[there] = one.saved_shape(masks.get(there))
        if not one.fits(masks.get(there)):
            raise ValueError(
                f"the masks of the checkpoint and of the engine differ in {one.name!r}: make the "
                f"engine with the checkpoint's own, sparse_comm.load_masks(folder / {_MASKS!r})"
            )
    for name, shape in shapes.items():
        meta = saved.get(f"model.{name}")
        if meta is not None and meta.size != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(meta.size)} in the checkpoint, expected {tuple(shape)}"
            )
        if meta is None:
            raise ValueError(
                f"the checkpoint has no {name!r}: it is of another model, or names of its engine "
                "and of this one differ (InterLayerEngine(…, names=…))"
            )


def _load_state(
    one: _Held,
    prefix: str,
    state: Mapping[str, Tensor],
    pattern: SparsityPattern | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    own = {}
    shape = state["model." + prefix.removeprefix("optimizer.").removesuffix(".")].shape
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        if value.shape == shape and value.dim():
            value = one.part(value, pattern).to(one.parameter.device)
        own[key.removeprefix(prefix)] = value
    optimizer.state.pop(one.parameter, None)
    if own:
        optimizer.state[one.parameter] = own


def _load_options(
    optimizer: torch.optim.Optimizer,
    held: list[_Held],
    wanted: Mapping[str, str],
    options: Mapping[str, dict[str, Any]],
) -> None:
    names = {id(one.parameter): wanted[one.name] for one in held}
    for group in optimizer.param_groups:
        given = [options[n] for p in group["params"] if (n := names.get(id(p), "")) in options]
        if any(one != given[0] for one in given):
            warnings.warn(
                "parameters that share a group of the optimizer had different options when they "
                "were saved: the group keeps its own",
                stacklevel=2,
            )
        elif given:
            group.update({k: _like(group.get(k))(v) for k, v in given[0].items()})


def _like(own: Any) -> Callable[[Any], Any]:
    """What gives an option of JSON the type that the optimizer has."""
    return tuple if isinstance(own, tuple) else lambda value: value


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a group of the optimizer; without what names its parameters."""
    left_out = ("params", "param_names")
    return {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name not in left_out
    }
