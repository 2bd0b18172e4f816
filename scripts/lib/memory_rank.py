"""One rank of ``measure_memory.py``: builds a model, trains it a little, reads resident memory."""

import ctypes
import gc
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparse_comm

from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT, VOCABULARY, Block

CONTEXT = 2  # tokens: activations and their gradients stay at some kB a layer
STEPS = 2  # optimizer state comes with the first, DDP's final buckets with the second


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns resident bytes, and what ``summary`` counts, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    if job["wrap"]:
        join(workdir, rank, job["ranks"])
    model = build(job)
    module: nn.Module = model
    if job["wrap"] == "ddp":
        module = DistributedDataParallel(model, gradient_as_bucket_view=job["bucket_view"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens, targets = torch.randint(VOCABULARY, (2, 1, CONTEXT)).unbind()
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=job["autocast"]):
            loss = module(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # gradients stay, as after backward
        report_progress(done=True)
    del loss
    resident = resident_bytes()
    counted = sparse_comm.summary(model, optimizer)
    leave()
    return {
        "resident": resident,
        "counted": counted.total_bytes,
        "parameters": sum(row.numel for row in counted.rows),
        "unpruned": sum(row.nnz for row in counted.rows),
    }


def build(job: dict) -> GPT:
    """The model, block by block, so that no more than one block is ever dense."""
    torch.manual_seed(0)
    model = GPT(0, job["width"], CONTEXT)
    for _ in range(job["layers"]):
        block = Block(job["width"])
        if job["weights"] != "dense":
            masks = {
                name: torch.rand(p.shape) < job["density"]
                for name, p in block.named_parameters()
                if p.dim() >= 2
            }
            narrow = torch.bfloat16 if job["autocast"] else None
            sparse_comm.compact(block, masks, weights=job["weights"], compute_dtype=narrow)
            del masks
        if job["wrap"] == "fsdp2":
            fully_shard(block)
        model.blocks.append(block)
        report_progress(done=True)
    if job["wrap"] == "fsdp2":
        fully_shard(model)
    return model


def resident_bytes() -> int:
    """VmRSS, after what is unused went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS: this script needs Linux")


if __name__ == "__main__":
    rank_main(main)
