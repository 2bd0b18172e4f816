"""Hugging Face: the Trainer and Accelerate, with DeepSpeed, DDP or one process; and saving.

``save_pretrained`` of a compact model writes the dense one without any of this; ``save_compact``
writes the compact one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from sparse_comm import check_masks, compact, is_compact, save_masks, values_changed
from sparse_comm.compact.convert import patterns_of
from sparse_comm.compact.slot import Mode
from sparse_comm.mask_file import MASKS, load_patterns
from sparse_comm.mask_sync import on_all_ranks
from sparse_comm.masks import masks_from_torch_prune, masks_from_zeros
from sparse_comm.pattern import SparsityPattern

from .report import FirstStep

__all__ = ["SparseCommCallback", "load_compact", "prepare", "save_compact"]

VALUES = "values.safetensors"
Patterns = Mapping[str, SparsityPattern]
Masks = str | os.PathLike[str] | Mapping[str, Tensor]


class SparseCommCallback(TrainerCallback):
    """Makes a Trainer's model compact before its optimizer is built, and keeps it so.

        trainer = Trainer(model, args, …, callbacks=[SparseCommCallback("masks.safetensors")])

    With ``TrainingArguments(deepspeed=…)`` whose config has an enabled block ``sparse_comm``, the
    block says what to do and no argument is needed. Models that are compact already stay as they
    are. The masks are written beside every checkpoint; ``save_pretrained`` and the checkpoints'
    ``model.safetensors`` are dense, so that anyone can load them.

    Args:
        masks: path of a file of ``sparse_comm.save_masks``, "from_zeros", "from_torch_prune", or
            bool masks by name.
        weights: as in ``compact``; None for "cached", with ZeRO 3 for "transient".
        compute_dtype: as in ``compact``; without DeepSpeed only.

    Raises:
        ValueError: at the Trainer's start: no masks here nor in a block, or in both; what
            ``compact`` and ``deepspeed.initialize`` of this package raise.

    Source: ours.
    """

    def __init__(
        self,
        masks: Masks | None = None,
        weights: Mode | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._masks, self._weights, self._compute_dtype = masks, weights, compute_dtype
        self._first_step: FirstStep | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is there, its optimizer is not."""
        model = kwargs["model"]
        if is_compact(model):
            return
        plugin = getattr(args, "deepspeed_plugin", None)  # also of `accelerate launch`
        config = args.hf_deepspeed_config.config if args.deepspeed else None
        if config is None and plugin is not None:
            config = plugin.deepspeed_config
        _make_compact(model, config, self._masks, self._weights, self._compute_dtype)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model was wrapped, and perhaps loaded.

        Raises:
            ValueError: it is dense, or the run resumes from a checkpoint with other masks.
        """
        model = kwargs["model"]
        if not is_compact(model):
            raise ValueError(
                "the Trainer's model is not compact: give SparseCommCallback to "
                "Trainer(callbacks=…) rather than to add_callback, and a model rather than a "
                "model_init, which makes another one"
            )
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / MASKS
        if saved.exists():
            on_all_ranks(lambda: _check_same(load_patterns(saved), patterns_of(model), saved))
        values_changed(model)
        if args.world_size > 1 and self._first_step is None:
            self._first_step = FirstStep(kwargs["model"], lambda parameter: parameter.dtype)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Something may have written since the last step."""
        values_changed(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """DeepSpeed writes through ``.data``."""
        values_changed(kwargs["model"])
        figures = self._first_step.end() if self._first_step else None
        if figures is not None and state.is_world_process_zero:
            print(FirstStep.text(figures), flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The best model may have been loaded."""
        values_changed(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint was written."""
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folders = [folder]
        if (folder / "latest").exists():  # DeepSpeed's, which has a folder in it
            folders.append(folder / (folder / "latest").read_text().strip())
        for each in folders:
            if each.is_dir():
                save_masks(patterns_of(kwargs["model"]), each / MASKS)


def prepare(
    accelerator: Any,
    *objects: Any,
    masks: Masks | None = None,
    weights: Mode | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """``accelerator.prepare(*objects)`` of Accelerate, with the model made compact first.

    Args:
        accelerator: with DeepSpeed, DDP, or one process.
        *objects: as in ``prepare``. An optimizer of the dense model is carried over.
        masks: as in ``SparseCommCallback``; not needed where the DeepSpeed config has a block.
        weights: as in ``SparseCommCallback``.
        compute_dtype: as in ``SparseCommCallback``.

    Returns:
        What ``prepare`` does; a DeepSpeed engine is fit for compact parameters.

    Raises:
        ValueError: no model among the objects, or two; and as ``SparseCommCallback``.

    Source: ours.
    """
    models = [each for each in objects if isinstance(each, nn.Module)]
    if len(models) != 1:
        raise ValueError(f"prepare takes one model to make compact, got {len(models)}")
    plugin = accelerator.state.deepspeed_plugin
    config = None if plugin is None else plugin.deepspeed_config
    optimizers = [each for each in objects if hasattr(each, "param_groups")]
    optimizer = optimizers[0] if optimizers else None
    changes = _make_compact(models[0], config, masks, weights, compute_dtype, optimizer)
    if config is None:
        return accelerator.prepare(*objects)
    from .deepspeed.accelerate import prepare_engine

    return prepare_engine(accelerator, objects, changes)


def _make_compact(
    model: nn.Module,
    config: dict[str, Any] | None,
    masks: Masks | None,
    weights: Mode | None,
    compute_dtype: torch.dtype | None,
    optimizer: Any = None,
) -> list[Any]:
    """By a DeepSpeed config and its block, or by arguments.

    Returns:
        The parameters that were replaced, if there is a DeepSpeed config.
    """
    if config is not None:
        if compute_dtype is not None:
            raise ValueError(
                "compute_dtype does not go with DeepSpeed, whose 'bf16' says what it is"
            )
        from .deepspeed.accelerate import compact_for_engine

        return compact_for_engine(config, model, masks, weights, optimizer)
    if masks is None:
        raise ValueError(
            "which masks? SparseCommCallback(masks=…) takes a file of sparse_comm.save_masks, "
            "'from_zeros', 'from_torch_prune' or a dict; with DeepSpeed the block 'sparse_comm'"
            " of its config does, too"
        )
    found = on_all_ranks(lambda: _found(masks, model))
    compact(model, found, weights or "cached", compute_dtype, optimizer)
    check_masks(model)
    return []


def _check_same(saved: Patterns, own: Patterns, path: Path) -> None:
    for name, pattern in own.items():
        if name not in saved or saved[name].digest() != pattern.digest():
            raise ValueError(
                f"the run resumes from a checkpoint that has another mask for {name!r} than the "
                f"model: give the callback its masks, {str(path)!r}"
            )


def _found(masks: Masks, model: nn.Module) -> Mapping[str, Any]:
    if isinstance(masks, Mapping):
        return masks
    sources = {"from_zeros": masks_from_zeros, "from_torch_prune": masks_from_torch_prune}
    name = os.fspath(masks)
    return sources[name](model) if name in sources else load_patterns(name)


def save_compact(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a compact Hugging Face model as it is: its values and, as bits, its masks.

    Takes f of the dense model's bytes and 1/8 byte a masked parameter. For the dense model, which
    anyone can load, use ``model.save_pretrained``.

    Args:
        model: compact, not wrapped (under ZeRO 3: ``save_pretrained`` of the consolidated state).
        folder: made if it is not there.

    Raises:
        ValueError: the model is not compact, or its values are partitioned.

    Source: ours.
    """
    if not is_compact(model):
        raise ValueError("the model is not compact: use its save_pretrained")
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # DeepSpeed need not be there
        raise ValueError(
            "the values are partitioned by ZeRO 3: save the dense model by the Trainer or "
            "engine.save_16bit_model, and make it compact when it is loaded"
        )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(path)
    save_masks(patterns_of(model), path / MASKS)
    safetensors.torch.save_model(model, str(path / VALUES))


def load_compact(folder: str | os.PathLike[str], weights: Mode = "cached") -> Any:
    """The model that ``save_compact`` wrote, compact.

    Args:
        folder: that was given to ``save_compact``.
        weights: as in ``compact``.

    Returns:
        A model of its class, in training mode as it was made.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder's architecture is not one of transformers.

    Source: ours.
    """
    path = Path(folder)
    config = transformers.AutoConfig.from_pretrained(path)
    (name,) = config.architectures
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ValueError(
            f"{str(path)!r} holds a {name}, which transformers has not: make the model, compact it "
            f"with sparse_comm.load_masks(…/{MASKS}) and load {VALUES} with safetensors"
        )
    made = model_class(config).to(config.dtype or torch.float32)
    model = compact(made, load_patterns(path / MASKS), weights)
    safetensors.torch.load_model(model, str(path / VALUES))
    return model
