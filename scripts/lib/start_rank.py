"""One rank of ``measure_start.py``: starts engines for one pruned model, dense and compact."""

import copy
import functools
import gc
import time
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from sparse_comm.integrations.deepspeed import initialize

import sparse_comm

from .bench import RANKS, Side, Start, take_turns
from .deepspeed_run import as_launched
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT

CONTEXT = 2


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns seconds of each start, by side, and of sparse_comm's part; ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    as_launched(rank, RANKS)
    join(workdir, rank, RANKS)
    torch.manual_seed(0)
    model = GPT(job["layers"], job["width"], CONTEXT).bfloat16()
    masks = sparse_comm.prune.magnitude(model, 1 - job["density"], scope="layer")
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    file = workdir / f"masks{rank}.safetensors"
    sparse_comm.save_masks(masks, file)
    del masks
    starts = Starts(model, job["stage"])
    starts.run(lambda: None, None)  # the first of a process imports torch's compiler, for a second
    # By side: what the block has as masks, "" for a file; None for no block.
    named = {side: str(file) if masks == "" else masks for side, masks in job["sides"].items()}
    sides: dict[str, Side] = {
        side: functools.partial(starts.run, masks=source) for side, source in named.items()
    }
    measured: dict[str, Any] = take_turns(
        sides, job["repeats"], "lo", lambda side: report_progress(done=True)
    )
    for side, source in named.items():
        if source is not None:
            measured[side]["own"] = starts.own[source]
    leave()
    return {"parameters": sum(p.numel() for p in model.parameters()), "sides": measured}


class Starts:
    """Starts one engine after another, each around a copy of one model."""

    def __init__(self, model: GPT, stage: int) -> None:
        self.own: dict[str, list[float]] = {}  # seconds, by what 'masks' names
        self._model, self._stage = model, stage
        self._engine: Any = None
        self._plain = deepspeed.initialize
        self._inner = 0.0

    def run(self, start: Start, masks: str | None) -> None:
        """Dense (``masks=None``), or compact."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        gc.collect()
        model = copy.deepcopy(self._model)
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "fused": True}},
            "zero_optimization": {"stage": self._stage},
        }
        if masks is not None:
            config["sparse_comm"] = {"masks": masks}
        parameters = list(model.parameters())
        with mock.patch.object(deepspeed, "initialize", self._timed):  # what ours calls
            start()
            began = time.perf_counter()
            self._engine, *_ = initialize(model=model, model_parameters=parameters, config=config)
            took = time.perf_counter() - began
        if masks is not None:
            self.own.setdefault(masks, []).append(took - self._inner)

    def _timed(self, **given: Any) -> Any:
        began = time.perf_counter()
        started = self._plain(**given)
        self._inner = time.perf_counter() - began
        return started


if __name__ == "__main__":
    rank_main(main)
