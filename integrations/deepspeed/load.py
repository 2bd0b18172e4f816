"""What an engine with compact parameters saves and loads."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS, PARAM
from torch import Tensor

from sparse_comm import save_masks, values_changed
from sparse_comm.compact.convert import patterns_of
from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.state import expand_state as expand_model_state
from sparse_comm.mask_file import MASKS, load_patterns
from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pattern import SparsityPattern

from .checkpoint import folder_of, pack_checkpoint, pack_state
from .names import global_names
from .partitioned import is_partitioned

__all__ = ["Checkpoints"]

Patterns = dict[str, SparsityPattern]


class Checkpoints:
    """The methods of an engine that save and load. Every one is a collective."""

    module: Any
    optimizer: Any

    def save_checkpoint(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """As DeepSpeed's, with the masks of the whole model beside the states."""
        name = str(tag) if tag is not None else f"global_step{self.global_steps}"  # type: ignore[attr-defined]
        whole = _of_all_ranks(_patterns(self))
        engine: Any = self
        rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        on_all_ranks(lambda: _write_masks(whole, Path(save_dir) / name, rank == 0))
        return super().save_checkpoint(  # type: ignore[misc]
            save_dir,
            tag=tag,
            client_state={} if client_state is None else client_state,
            save_latest=save_latest,
            exclude_frozen_parameters=exclude_frozen_parameters,
        )

    def load_checkpoint(self, load_dir: Any, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, of a compact checkpoint with the same masks, or of a dense one.

        Raises:
            ValueError: the checkpoint has other masks; nothing was loaded.
        """
        try:
            universal = self.load_universal_checkpoint()  # type: ignore[attr-defined]
            folder, is_compact = _agreed(
                on_all_ranks(lambda: _kind(load_dir, tag, universal, _patterns(self)))
            )
            if folder is None or is_compact:
                return super().load_checkpoint(load_dir, tag, *args, **kwargs)  # type: ignore[misc]
            if universal:
                raise ValueError(
                    f"{str(folder)!r} is a dense universal checkpoint: make it compact with "
                    "pack_checkpoint, and load that"
                )
            return self._load_dense(folder, *args, **kwargs)
        finally:
            values_changed(self.module)

    def save_16bit_model(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's: a plain dense state dict."""
        self.__dict__["_sparse_comm_dense_states"] = True
        try:
            written = super().save_16bit_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["_sparse_comm_dense_states"]
        if not written:
            warnings.warn(
                "save_16bit_model wrote nothing: with ZeRO 3 DeepSpeed needs "
                "'stage3_gather_16bit_weights_on_model_save': true in 'zero_optimization'",
                stacklevel=2,
            )
        return written

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; dense for ``save_16bit_model``."""
        state = super().module_state_dict(*args, **kwargs)  # type: ignore[misc]
        if "_sparse_comm_dense_states" in self.__dict__:
            return expand_model_state(self.module, state)
        return state

    def _zero3_consolidated_16bit_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, dense: for ``save_16bit_model`` and Accelerate's ``get_state_dict``."""
        state = super()._zero3_consolidated_16bit_state_dict(*args, **kwargs)  # type: ignore[misc]
        return None if state is None else expand_model_state(self.module, state)

    def load_module_state_dict(self, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's, which copies frozen parameters once more, from where they are dense."""
        fragments = checkpoint.get(FROZEN_PARAM_FRAGMENTS)
        if fragments and "_sparse_comm_loads_dense" in self.__dict__:
            own = dict(self.module.named_parameters())
            packed = {name: _data(own[name]) for name in _patterns(self) if name in fragments}
            checkpoint = {**checkpoint, FROZEN_PARAM_FRAGMENTS: {**fragments, **packed}}
        return super().load_module_state_dict(checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _load_dense(
        self,
        folder: Path,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """Weights, which the model packs, and then the optimizer's state by way of the disk."""
        engine: Any = self
        if load_optimizer_states and not load_module_only:
            _check_states(engine, folder)
        self.__dict__["_sparse_comm_loads_dense"] = True
        try:
            loaded, client = super().load_checkpoint(  # type: ignore[misc]
                str(folder.parent),
                folder.name,
                load_module_strict=load_module_strict,
                load_optimizer_states=False,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )
        finally:
            del self.__dict__["_sparse_comm_loads_dense"]
        if loaded is None or load_module_only or not load_optimizer_states:
            return loaded, client
        state = client.pop("optimizer", None)
        if engine.zero_optimization():
            self._load_dense_states(folder)
        elif state is not None:
            engine.optimizer.load_state_dict(_packed(state, _groups(engine)))
        return loaded, client

    def _load_dense_states(self, folder: Path) -> None:
        engine: Any = self
        whole = _of_all_ranks(_patterns(engine))
        is_first = engine.global_rank == 0
        made = on_all_ranks(
            lambda: tempfile.mkdtemp(prefix=".sparse_comm-", dir=folder.parent) if is_first else ""
        )
        draft = Path(gather(made)[0])
        try:
            on_all_ranks(lambda: _pack_on_first(whole, folder, draft))
            engine.optimizer.load_state_dict(None, checkpoint_folder=str(draft / folder.name))
            if not engine.zero_optimization_partition_weights():
                engine.optimizer.update_lp_params()
        finally:
            gather(None)  # all have read it
            if is_first:
                shutil.rmtree(draft, ignore_errors=True)


def _data(parameter: Any) -> Tensor:
    """Where DeepSpeed keeps what it holds of a parameter."""
    data: Tensor = parameter.ds_tensor if is_partitioned(parameter) else parameter.data
    return data


def _patterns(engine: Any) -> Patterns:
    """Of this rank's compact parameters, by their names in the whole model."""
    mpu = None if engine.pipeline_parallelism else engine.mpu
    there = global_names(engine.module, mpu)
    return {there[name]: pattern for name, pattern in patterns_of(engine.module).items()}


def _groups(engine: Any) -> list[list[SparsityPattern | None]]:
    """Of the parameters as the optimizer's groups have them."""
    of = {
        id(module._parameters[name]): slot.pattern
        for _, module, name, slot in compact_slots(engine.module)
    }
    # DeepSpeed's wrappers for 16 bits keep the parameters in fp16_groups, and masters in groups.
    groups = getattr(engine.optimizer, "fp16_groups", None)
    if groups is None:
        groups = [group["params"] for group in engine.optimizer.param_groups]
    return [[of.get(id(parameter)) for parameter in group] for group in groups]


def _of_all_ranks(mine: Patterns) -> Patterns:
    """Those of the whole model, as rank 0 knows it; each from the first rank that has it.

    A collective. Other ranks know their own, and those that rank 0 has not.
    """
    names = gather(list(mine))
    rank = _rank()
    elsewhere = {name for held in names[:rank] for name in held}
    parts = gather({n: p.to("cpu") for n, p in mine.items() if n not in elsewhere} if rank else {})
    whole = dict(mine)
    for part in parts:
        whole.update(part)
    return whole


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _write_masks(whole: Patterns, folder: Path, is_writer: bool) -> None:
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        save_masks(whole, folder / MASKS)


def _kind(load_dir: Any, tag: Any, universal: bool, patterns: Patterns) -> tuple[Path | None, bool]:
    """The folder of a checkpoint, and whether it is compact; None if DeepSpeed is to complain.

    Raises:
        ValueError: it has other masks, has lost them, or is one that this engine cannot load.
    """
    try:
        folder = folder_of(load_dir, tag, universal)
    except FileNotFoundError:
        return None, True
    path = folder / MASKS
    if (folder / "zero").is_dir() and not universal:
        raise ValueError(
            f"{str(folder)!r} is a universal checkpoint: start the engine with "
            "'checkpoint': {'load_universal': true} in its config, in ZeRO 1 or 2, or in 3 if it "
            "was saved by ZeRO 3"
            + ("" if path.exists() else "; and make the checkpoint compact with pack_checkpoint")
        )
    if not path.exists():
        _refuse_lost_masks(folder, patterns)
        return folder, False
    saved = load_patterns(path)
    for name, pattern in patterns.items():
        if name not in saved:
            raise ValueError(f"the checkpoint {str(folder)!r} has no mask for {name!r}")
        if saved[name].digest() != pattern.digest():
            raise ValueError(
                f"the checkpoint {str(folder)!r} has another mask for {name!r} than the engine "
                f"(digest {saved[name].digest()}, the engine's {pattern.digest()}): start the "
                f"engine with the masks of the checkpoint, 'masks': {str(path)!r}, or expand the "
                "checkpoint (expand_checkpoint) and load it as a dense one"
            )
    return folder, True


def _refuse_lost_masks(folder: Path, patterns: Patterns) -> None:
    """Refuse a compact checkpoint without its masks: its 1-D values are no dense weights."""
    if (folder / "zero").is_dir():  # universal
        for name, pattern in patterns.items():
            file = folder / "zero" / name / "fp32.pt"
            if file.exists() and _numel(file) == pattern.nnz != pattern.numel:
                raise _lost_masks(folder, name)
        return
    for file in sorted(folder.glob("*model_states.pt")):
        state = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
        module = state.get("module") or {}
        shapes = {name: tuple(t.shape) for name, t in module.items() if isinstance(t, Tensor)}
        for group in state.get("param_shapes") or ():  # ZeRO 3 leaves placeholders in the module
            shapes |= {name: tuple(shape) for name, shape in group.items()}
        for name, pattern in patterns.items():
            if len(pattern.shape) > 1 and shapes.get(name) == (pattern.nnz,):
                raise _lost_masks(folder, name)


def _numel(file: Path) -> int:
    """Entries of a parameter's file in a universal checkpoint."""
    held: Any = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    state: Tensor = held[PARAM] if isinstance(held, dict) else held  # bare in ZeRO 3
    return state.numel()


def _lost_masks(folder: Path, name: str) -> ValueError:
    return ValueError(
        f"{str(folder)!r} holds the values of {name!r}, but not the masks that go with them: copy "
        f"{MASKS} of the checkpoint, too"
    )


def _agreed(kind: tuple[Path | None, bool]) -> tuple[Path | None, bool]:
    """What all ranks found. A collective."""
    kinds = gather((kind[0] is None, kind[1]))
    if len(set(kinds)) > 1:
        raise ValueError(
            "the ranks see different checkpoints: "
            + "; ".join(
                f"rank {rank}: {'none' if absent else 'compact' if is_compact else 'dense'}"
                for rank, (absent, is_compact) in enumerate(kinds)
            )
        )
    return kind


def _check_states(engine: Any, folder: Path) -> None:
    """Refuse, before anything is loaded, a dense checkpoint whose optimizer cannot be packed."""
    weights = "load the weights alone: load_checkpoint(…, load_optimizer_states=False)"
    if engine.has_moe_layers:
        raise ValueError(
            f"the dense checkpoint {str(folder)!r} keeps its optimizer's state by experts, which "
            f"cannot be packed; {weights}"
        )
    name = type(engine.basic_optimizer).__name__
    if engine.zero_optimization() and "Adam" not in name:
        raise ValueError(
            f"the optimizer is {name}, and of a dense checkpoint of ZeRO only the state of Adam "
            f"and AdamW can be packed; {weights}"
        )


def _packed(state: dict[str, Any], groups: list[list[SparsityPattern | None]]) -> dict[str, Any]:
    """The state dict of a dense optimizer without ZeRO, packed."""
    inner = state.get("optimizer_state_dict", state)  # of a wrapper for 16 bits
    numbers = [number for group in inner["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, [pattern for group in groups for pattern in group], strict=True))
    moments = {
        number: {key: _packed_one(value, of[number]) for key, value in entries.items()}
        for number, entries in inner["state"].items()
    }
    packed = {**inner, "state": moments}
    if inner is state:
        return packed
    if "fp32_groups" not in state:
        raise ValueError(
            "the dense checkpoint's optimizer (FusedAdam in 16 bits without ZeRO) keeps all its "
            "parameters in one, which cannot be packed: load_checkpoint(…, "
            "load_optimizer_states=False), or train with ZeRO 1"
        )
    masters = [
        [_packed_one(master, pattern) for master, pattern in zip(saved, group, strict=True)]
        for saved, group in zip(state["fp32_groups"], groups, strict=True)
    ]
    return {**state, "optimizer_state_dict": packed, "fp32_groups": masters}


def _packed_one(value: Any, pattern: SparsityPattern | None) -> Any:
    if pattern is None or not isinstance(value, Tensor) or value.shape != pattern.shape:
        return value
    return pack_state(value.detach(), pattern)


def _pack_on_first(whole: Patterns, folder: Path, draft: Path) -> None:
    if _rank() == 0:
        save_masks(whole, draft / MASKS)
        pack_checkpoint(folder.parent, draft, draft / MASKS, folder.name)
