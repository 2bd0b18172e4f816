"""One rank of ``measure_zero_memory.py``: an engine, trained a little; reads resident memory."""

from pathlib import Path

import deepspeed
import torch
from sparse_comm.integrations.deepspeed import watch

import sparse_comm

from .deepspeed_run import as_launched
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .memory_rank import CONTEXT, STEPS, build, resident_bytes
from .model import VOCABULARY


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns resident bytes, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    as_launched(rank, job["ranks"])
    join(workdir, rank, job["ranks"])
    model = build(job).bfloat16()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 1e-4, "torch_adam": True, "fused": True},
        },
        "zero_optimization": {"stage": job["stage"]},  # all else as by default
    }
    engine = deepspeed.initialize(
        model=model, config=config, model_parameters=list(model.parameters())
    )[0]
    if sparse_comm.is_compact(model):
        watch(engine)
    del model
    tokens, targets = torch.randint(VOCABULARY, (2, 1, CONTEXT)).unbind()
    for _ in range(STEPS):
        loss = engine(tokens, targets)
        engine.backward(loss)
        engine.step()
        report_progress(done=True)
    del loss
    resident = resident_bytes()
    entries = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    leave()
    return {"resident": resident, "entries": entries}


if __name__ == "__main__":
    rank_main(main)
