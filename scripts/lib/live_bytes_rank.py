"""One rank of ``measure_live_bytes.py``: which dense weights are alive, by two independent counts.

Only tensors at least as large as the smallest masked weight count. The model is set up so that
nothing else is that large: a short sequence keeps activations small, and a low density keeps the
values of a whole block below it.
"""

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import sparse_comm

from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT, VOCABULARY

CONTEXT = 8
AFTER_FORWARD = "live_bytes: after forward"


Weights = Literal["dense", "cached", "transient"]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    run: str  # one of RUNS
    weights: Weights


RUNS = (
    "eager",
    "eager, autocast bf16",
    "eager, autocast bf16, compute_dtype",
    "checkpointing, non-reentrant",
    "checkpointing, reentrant",
    "compiled, aot_eager",
    "compiled, inductor",
    "FSDP2, 2 ranks",
)


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    job = read_job(arguments)
    torch.set_num_threads(1)
    if job["ranks"] > 1:
        join(workdir, rank, job["ranks"])
    results = []
    for fields in job["cases"]:
        results.append(measure(Case(**fields), job))
        report_progress(done=True)
    leave()
    return {"cases": results}


def measure(case: Case, job: dict) -> dict:
    """Bytes of dense weights after forward, and at most during forward and backward."""
    model, sizes = make_model(case, job)
    narrow = 2 if "bf16" in case.run else 4
    threshold = min(sizes) * narrow
    run: Any = model
    if case.run.startswith("compiled"):
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend=case.run.split(", ")[1])
    torch.manual_seed(1)
    tokens, targets = torch.randint(VOCABULARY, (2, 1, CONTEXT)).unbind()

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow == 2):
            return run(tokens, targets)

    forward().backward()  # compiles; FSDP2 sets itself up
    model.zero_grad()
    resident = resident_bytes(model, case)
    allocated = allocations(forward, threshold)
    model.zero_grad()
    return {
        "largest layer": max(sizes) * 4,
        "threshold": threshold,
        "resident": resident,
        "allocator": {
            "after forward": resident + allocated["after forward"],
            "peak in forward": resident + allocated["peak in forward"],
            "peak in backward": resident + allocated["peak in backward"],
        },
        "most at once in backward": allocated["most at once in backward"],
        "storages after forward": storages(forward, threshold, model, case),
    }


def make_model(case: Case, job: dict) -> tuple[GPT, list[int]]:
    """The model, and the number of entries of each masked weight."""
    torch.manual_seed(0)
    model = GPT(job["layers"], job["width"], CONTEXT)
    masks = {
        name: torch.rand(p.shape) < job["density"]
        for name, p in model.named_parameters()
        if p.dim() >= 2 and name != "position_embedding.weight"
    }
    if case.weights != "dense":
        narrow = torch.bfloat16 if case.run.endswith("compute_dtype") else None
        sparse_comm.compact(model, masks, weights=case.weights, compute_dtype=narrow)
    for block in model.blocks:
        if case.run.startswith("checkpointing"):
            reentrant = not case.run.endswith("non-reentrant")
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)
        if case.run.startswith("FSDP2"):
            fully_shard(block, reshard_after_forward=True)
    if case.run.startswith("FSDP2"):
        fully_shard(model, reshard_after_forward=True)
    return model, [mask.numel() for mask in masks.values()]


def resident_bytes(model: GPT, case: Case) -> int:
    """Dense weights that this process holds all the time: parameters, or caches."""
    if case.weights != "dense":
        return sparse_comm.summary(model).cache_bytes
    weights = [p for p in model.parameters() if p.dim() >= 2 and len(p) != CONTEXT]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in weights)


# --- first count: the allocator's own record -----------------------------------------------------


def allocations(forward: Any, threshold: int) -> dict[str, int]:
    """Large blocks that torch's CPU allocator handed out and got back in one training step.

    Sees everything: operators, autograd, compiled code and FSDP2.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = forward()
        with record_function(AFTER_FORWARD):
            pass
        loss.backward()
    live: dict[int, int] = {}
    found = {"peak in forward": 0, "peak in backward": 0, "most at once in backward": 0}
    phase = "forward"
    for address, size in _memory_events(profiled):
        if address is None:
            found["after forward"] = sum(live.values())
            phase = "backward"
        elif size >= threshold:
            live[address] = size
        elif size < 0:
            live.pop(address, None)
        key = f"peak in {phase}"
        found[key] = max(found[key], sum(live.values()))
        if phase == "backward":
            found["most at once in backward"] = max(found["most at once in backward"], len(live))
    return found


def _memory_events(profiled: profile) -> Iterator[tuple[int | None, int]]:
    """(address, bytes) in order of time, bytes < 0 for a release; (None, 0) after the forward."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    kept = [e for e in events if e.get("name") in ("[memory]", AFTER_FORWARD) and "ts" in e]
    for event in sorted(kept, key=lambda e: e["ts"]):
        if event["name"] == AFTER_FORWARD:
            yield None, 0
        else:
            yield event["args"]["Addr"], event["args"]["Bytes"]


# --- second count: storages that are still referred to -------------------------------------------


class Storages(TorchDispatchMode):
    """Weak references to the storage of each large tensor that an operator gave."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= self.threshold:
            self.seen[storage._cdata] = StorageWeakRef(storage)

    def live_bytes(self) -> int:
        alive = [ref for ref in self.seen.values() if not ref.expired()]
        # FSDP2 keeps storages and takes their memory away: the size now is what counts
        sizes = [torch.UntypedStorage._new_with_weak_ptr(ref.cdata).nbytes() for ref in alive]
        return sum(size for size in sizes if size >= self.threshold)


def storages(forward: Any, threshold: int, model: GPT, case: Case) -> int | None:
    """Large storages alive after a forward pass; None where shards would mix with whole weights."""
    if case == Case("FSDP2, 2 ranks", "dense"):
        return None
    watch = Storages(threshold)
    compiled = case.run.startswith("compiled")
    with contextlib.nullcontext() if compiled else watch:
        loss = forward()
    # Of compiled code the operators are not seen, but its one autograd node can be asked.
    saved = loss.grad_fn.saved_tensors if compiled else ()
    for tensor in (*saved, *_resident(model)):
        watch.add(tensor)
    live = watch.live_bytes()
    loss.backward()
    model.zero_grad()
    return live


def _resident(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and caches, which embeddings read without an operator that would show them."""
    yield from (p for p in model.parameters() if not isinstance(p, DTensor))
    for module in model.modules():
        for slot in getattr(module, "_compact", {}).values():
            if slot.cache is not None:
                yield slot.cache


if __name__ == "__main__":
    rank_main(main)
