"""Hugging Face's Trainer and Accelerate train what they train masked dense, and save it dense."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DummyOptim
from sparse_comm.integrations.transformers import (
    SparseCommCallback,
    load_compact,
    prepare,
    save_compact,
)
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import sparse_comm
from tests.compact.models import random_masks, same_nnz_masks, same_state, zero_pruned_
from tests.integrations.cases import Cases, case, passed
from tests.integrations.deepspeed.training import mask_gradients
from tests.launch import shared_folder

CASES: Cases = {}
TIMEOUT = 250
STAGES = (None, 0, 1, 2, 3)  # None: DDP
VOCABULARY = 96
LENGTH = 16


def bert() -> BertForMaskedLM:
    """Its head has the weight of its embedding, and LayerNorms are between."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def pruned() -> tuple[BertForMaskedLM, dict[str, Tensor], str]:
    """A model, its masks, and a file of them. A collective."""
    model = bert()
    masks = random_masks(model)
    zero_pruned_(model, masks)
    path = shared_folder() / "masks.safetensors"
    if dist.get_rank() == 0:
        sparse_comm.save_masks(masks, path)
    dist.barrier()
    return model, masks, str(path)


class Text(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        return {
            "input_ids": tokens,
            "labels": tokens.clone(),
            "attention_mask": torch.ones_like(tokens),
        }


def deepspeed_config(stage: int | None, masks: str | None) -> dict[str, Any] | None:
    if stage is None:
        return None
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True},
        },
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    }
    return config | ({"sparse_comm": {"masks": masks}} if masks else {})


def trainer(
    model: nn.Module | Callable[[], nn.Module],
    stage: int | None,
    folder: Path,
    masks: str | None,
    **options: Any,
) -> Trainer:
    """Compact if there are masks; a function makes the model once the arguments are there."""
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=6,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=deepspeed_config(stage, masks),
        **options,
    )
    callback = SparseCommCallback(masks if stage is None else None)
    made = model if isinstance(model, nn.Module) else model()
    return Trainer(made, arguments, train_dataset=Text(), callbacks=[callback] if masks else [])


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def loss_of_saved(folder: Path) -> float:
    """Of the model that anyone would load."""
    transformers.integrations.unset_hf_deepspeed_config()  # else ZeRO 3 partitions what is loaded
    model = BertForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(**{name: t[None] for name, t in Text()[0].items()}).loss)


def each(function: Callable[[int | None], None]) -> Callable[[int | None], None]:
    for stage in STAGES:
        name = function.__name__.replace("_", " ")
        title = f"{name}, {'DDP' if stage is None else f'ZeRO {stage}'}"
        CASES[title] = lambda rank, world_size, stage=stage: function(stage)
    return function


@each
def the_trainer_trains_as_masked_dense_and_resumes(stage: int | None) -> None:
    model, masks, path = pruned()
    twin, _, _ = pruned()
    dense = trainer(mask_gradients(model, masks), stage, shared_folder(), None)
    dense.train()
    folder = shared_folder()
    compact = trainer(twin, stage, folder, path)
    compact.train()
    assert sparse_comm.is_compact(compact.model)
    assert losses(compact) == losses(dense)
    assert len(set(losses(compact))) == 6
    dense.save_model(str(folder / "dense"))
    compact.save_model(str(folder / "final"))
    dist.barrier()
    assert loss_of_saved(folder / "final") == loss_of_saved(folder / "dense")
    state = BertForMaskedLM.from_pretrained(folder / "final").state_dict()
    assert not any(state[name][~mask].any() for name, mask in masks.items())
    saved = sparse_comm.load_masks(folder / "checkpoint-3" / "masks.safetensors")
    assert same_state(saved, dict(sorted(sparse_comm.masks_of(compact.model).items())))
    again = trainer(pruned()[0], stage, folder, path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert losses(again)[-3:] == losses(compact)[-3:]
    forget_deepspeed()


def accelerated(stage: int | None, dummy: bool, is_compact: bool) -> list[float]:
    """Losses of four steps by Accelerate; ``dummy``: the optimizer is DeepSpeed's own."""
    model, masks, path = pruned()
    if not is_compact:
        mask_gradients(model, masks)
    plugin = None
    if (config := deepspeed_config(stage, path if is_compact else None)) is not None:
        if not dummy:
            del config["optimizer"]
            config["zero_allow_untested_optimizer"] = True
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        plugin = DeepSpeedPlugin(hf_ds_config=config | sizes)
    accelerator = Accelerator(cpu=plugin is None, deepspeed_plugin=plugin)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = (DummyOptim if dummy else torch.optim.AdamW)(groups, lr=1e-2)
    if is_compact:
        masks_argument = {"masks": path} if stage is None else {}
        wrapped, optimizer = prepare(accelerator, model, optimizer, **masks_argument)
    else:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    inputs = {name: t[None] for name, t in Text()[dist.get_rank()].items()}
    found = []
    for _ in range(4):
        loss = wrapped(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    forget_deepspeed()
    return found


def forget_deepspeed() -> None:
    """What Hugging Face keeps of it in a process, from one training to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    transformers.integrations.unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@case(CASES)
def accelerate_prepares(rank: int, world_size: int) -> None:
    forget_deepspeed()
    for stage, dummy in ((None, False), (1, False), (1, True), (3, False), (3, True)):
        dense = accelerated(stage, dummy, is_compact=False)
        assert accelerated(stage, dummy, is_compact=True) == dense
        assert len(set(dense)) == 4


@case(CASES)
def a_model_that_zero_3_partitions_as_it_is_loaded(rank: int, world_size: int) -> None:
    """As Hugging Face's examples do: arguments first, then ``from_pretrained``."""
    model, _, path = pruned()
    folder = shared_folder()
    if rank == 0:
        model.save_pretrained(folder / "start")
    dist.barrier()
    whole = trainer(model, 3, folder / "whole", path)
    whole.train()
    forget_deepspeed()
    trained: list[Any] = []

    def load() -> nn.Module:
        loaded = BertForMaskedLM.from_pretrained(folder / "start")
        for part in loaded.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        trained.append(loaded)
        assert all(hasattr(parameter, "ds_id") for parameter in loaded.parameters())
        return loaded

    partitioned = trainer(load, 3, folder / "partitioned", path)
    partitioned.train()
    assert losses(partitioned) == losses(whole)
    assert sparse_comm.is_compact(trained[0])
    partitioned.save_model(str(folder / "final"))
    whole_loss = loss_of_saved(folder / "whole" / "checkpoint-6")
    dist.barrier()
    assert loss_of_saved(folder / "final") == whole_loss


@case(CASES)
def the_compact_model_is_saved_and_loaded(rank: int, world_size: int) -> None:
    model, masks, path = pruned()
    sparse_comm.compact(model, sparse_comm.load_masks(path))
    folder = shared_folder()
    save_compact(model, folder / str(rank))
    for weights in ("cached", "transient"):
        loaded = load_compact(folder / str(rank), weights=weights)
        assert type(loaded).__name__ == "BertForMaskedLM"
        assert same_state(sparse_comm.dense_state_dict(loaded), sparse_comm.dense_state_dict(model))
        embedding = loaded.bert.embeddings.word_embeddings
        assert (
            loaded.cls.predictions.decoder._parameters["weight"] is embedding._parameters["weight"]
        )
    total = sum(parameter.numel() for parameter in bert().parameters())
    masked = sum(mask.numel() for mask in masks.values())
    values = total - masked + sum(int(mask.sum()) for mask in masks.values())
    written = sum(file.stat().st_size for file in (folder / str(rank)).glob("*.safetensors"))
    assert written < 4 * values + masked / 8 + 20_000
    if rank == 0:
        model.save_pretrained(folder / "dense")
        assert math.isfinite(loss_of_saved(folder / "dense"))
        size = (folder / "dense" / "model.safetensors").stat().st_size
        assert size < 4 * total + 20_000  # the tied weight once
    with pytest.raises(ValueError, match="the model is not compact"):
        save_compact(bert(), folder)


@case(CASES)
def what_is_missing_is_said(rank: int, world_size: int) -> None:
    forget_deepspeed()
    folder = shared_folder()
    model, _, path = pruned()
    for stage, masks, block, said in (
        (None, None, None, "which masks?"),
        (1, None, None, "both are absent"),
        (1, path, path, "both are there"),
        (1, {"x": 1}, None, "with DeepSpeed, masks are the path of a file"),
    ):
        arguments = TrainingArguments(
            str(folder), use_cpu=True, report_to=[], deepspeed=deepspeed_config(stage, block)
        )
        with pytest.raises(ValueError, match=re.escape(said)):
            Trainer(model, arguments, callbacks=[SparseCommCallback(masks)])
        forget_deepspeed()
    assert not sparse_comm.is_compact(model)
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[])
    gone = "gone.safetensors" if rank else path
    with pytest.raises((FileNotFoundError, RuntimeError), match="gone"):
        Trainer(model, arguments, callbacks=[SparseCommCallback(gone)])


@case(CASES)
def a_trainer_that_would_train_dense_is_refused(rank: int, world_size: int) -> None:
    forget_deepspeed()
    model, _, path = pruned()
    late = trainer(model, None, shared_folder(), None)
    late.add_callback(SparseCommCallback(path))
    with pytest.raises(ValueError, match="the Trainer's model is not compact"):
        late.train()
    arguments = TrainingArguments(str(shared_folder()), use_cpu=True, max_steps=1, report_to=[])
    again = Trainer(
        model_init=lambda: pruned()[0],
        args=arguments,
        train_dataset=Text(),
        callbacks=[SparseCommCallback(path)],
    )
    with pytest.raises(ValueError, match="rather than a model_init"):
        again.train()


@case(CASES)
def a_checkpoint_with_other_masks_is_refused(rank: int, world_size: int) -> None:
    forget_deepspeed()
    model, masks, path = pruned()
    folder = shared_folder()
    trainer(model, None, folder, path).train()
    other = shared_folder() / "other.safetensors"
    if rank == 0:
        sparse_comm.save_masks(same_nnz_masks(masks), other)
    dist.barrier()
    foreign = trainer(pruned()[0], None, folder, str(other))
    with pytest.raises(ValueError, match="resumes from a checkpoint that has another mask"):
        foreign.train(resume_from_checkpoint=str(folder / "checkpoint-3"))


@case(CASES)
def a_bf16_model_comes_back_in_bf16(rank: int, world_size: int) -> None:
    model, _, path = pruned()
    sparse_comm.compact(model.to(torch.bfloat16), sparse_comm.load_masks(path))
    folder = shared_folder() / str(rank)
    save_compact(model, folder)
    loaded = load_compact(folder)
    assert loaded.dtype == torch.bfloat16
    assert same_state(sparse_comm.dense_state_dict(loaded), sparse_comm.dense_state_dict(model))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_hugging_face(name):
    passed(__name__, 2, name)
