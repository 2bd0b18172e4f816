"""One rank of ``compare_comm.py``: one pruned GPT trains under DeepSpeed, dense and compact.

All engines of one ZeRO stage have equal weights at the start, and the same config but for the block
``sparse_comm``. They take turns.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import deepspeed
import torch
from sparse_comm.integrations.deepspeed import initialize
from torch import Tensor, nn

import sparse_comm

from .bench import RANKS
from .deepspeed_report import DENSE, PHASES, sides_of
from .deepspeed_run import as_launched
from .job import join, leave, read_job
from .launch import rank_main
from .model import GPT
from .pair import mean_loss
from .step_kinds import CACHED, MASKED_DENSE, TRANSIENT, Phases
from .step_peers import LEARNING_RATE, WEIGHT_DECAY
from .step_rank import train_in_turn
from .step_start import Data, pruned_start, unpruned_entries

MODES = {CACHED: "cached", TRANSIENT: "transient"}

Config = dict[str, Any]


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each side, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    as_launched(rank, RANKS)
    join(workdir, rank, RANKS)  # DeepSpeed takes the process group that it finds
    data = Data(job, rank)
    model, masks = pruned_start(job)
    start_loss = mean_loss(model, data.held_out)
    file = workdir / f"masks{rank}.safetensors"
    sparse_comm.save_masks(masks, file)
    sides = [
        Side(kind, start(kind, copy.deepcopy(model), masks, file, job["stage"]))
        for kind in sides_of(job["stage"])
    ]
    measured = train_in_turn(sides, job, data)
    for side, facts in zip(sides, measured, strict=True):
        facts["held_out"] = side.held_out_loss(data.held_out)
        facts["pruned_weights_left"] = side.pruned_weights_left(masks)
    leave()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "unpruned": unpruned_entries(model, masks),
        "start_loss": start_loss,
        "peers": measured,
    }


def config_of(stage: int) -> Config:
    """The DeepSpeed config that all sides of a ZeRO stage share."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        # DeepSpeed's default of 1.0 scales gradients by a norm whose terms a compact model adds in
        # another order: losses would differ by rounding.
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {
            "stage": stage,
            # By default parameters of up to 1e5 entries stay whole on every rank. In a model this
            # small all compact ones have fewer: nothing of them would be partitioned.
            "stage3_param_persistence_threshold": 0,
        },
    }


def start(kind: str, model: GPT, masks: Mapping[str, Tensor], file: Path, stage: int) -> Any:
    """The engine of one side.

    Args:
        kind: which.
        model: with pruned weights at zero; the engine takes it over.
        masks: of the weights.
        file: holds the masks.
        stage: of ZeRO.
    """
    config = config_of(stage)
    if kind in MODES:
        config["sparse_comm"] = {"masks": str(file), "weights": MODES[kind]}
    elif kind == MASKED_DENSE:
        mask_gradients(model, masks)
    else:
        assert kind == DENSE
    groups = sparse_comm.param_groups(model, WEIGHT_DECAY)
    # Without the block this is deepspeed.initialize.
    engine, *_ = initialize(model=model, model_parameters=groups, config=config)
    return engine


def mask_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """From now on pruned entries get no gradient: where weights are zero, AdamW leaves them so."""
    for name, mask in masks.items():
        model.get_parameter(name).register_hook(lambda gradient, mask=mask: gradient * mask)


class Side:
    """One training: an engine, and how its steps are timed."""

    def __init__(self, kind: str, engine: Any) -> None:
        self.kind, self._engine = kind, engine

    def step(self, tokens: Tensor, targets: Tensor) -> tuple[float, Phases]:
        """One training step: its loss, and the seconds of its phases.

        "forward"; "backward", with the reduction of gradients; "optimizer": the engine's ``step``,
        which gathers the updated parameters. ZeRO 3 gathers them in forward and backward.
        """
        times = [time.perf_counter()]
        loss = self._engine(tokens, targets)
        times.append(time.perf_counter())
        self._engine.backward(loss)
        times.append(time.perf_counter())
        self._engine.step()
        times.append(time.perf_counter())
        lengths = [end - begin for begin, end in pairwise(times)]
        return loss.item(), dict(zip(PHASES, lengths, strict=True))

    @torch.no_grad()
    def held_out_loss(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Mean over this rank's batches; under ZeRO 3 a collective, a batch at a time."""
        self._engine.eval()
        return fmean(self._engine(*batch).item() for batch in batches)

    def pruned_weights_left(self, masks: Mapping[str, Tensor]) -> int:
        """How many pruned weights are not exactly zero, as modules see them. A collective."""
        left = 0
        for name, mask in masks.items():
            path, _, attribute = name.rpartition(".")
            module = self._engine.module.get_submodule(path)
            partitioned = [p for p in module.parameters(recurse=False) if hasattr(p, "ds_id")]
            with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
                weight = getattr(module, attribute).detach()
                left += int(weight[~mask].count_nonzero())
        return left


if __name__ == "__main__":
    rank_main(main)
