"""One rank of the quickstart: warm up, prune, then train dense and compact in turn."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import sparse_comm

from .job import join, leave
from .launch import rank_main, report_progress
from .model import GPT
from .pair import (
    BatchOfStep,
    Side,
    make_pair,
    make_side,
    mean_loss,
    pruned_weights_left,
    state_bytes,
    train_in_turn,
    train_step,
)
from .settings import WORLD_SIZE, Settings, Stage
from .text import batch, standard_library_text

VALIDATION_BATCHES = 8  # per rank
VALIDATION_BATCH = 8  # sequences


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Do one stage; returns what this rank measured, ready for JSON."""
    stage = Stage.load(Path(arguments[0]))
    settings = stage.settings
    torch.set_num_threads(1)
    join(workdir, rank, WORLD_SIZE)
    training_text, held_out = standard_library_text()
    validation = [
        batch(held_out, VALIDATION_BATCH, settings.context, seed=rank + WORLD_SIZE * index)
        for index in range(VALIDATION_BATCHES)
    ]

    def batch_of_step(step: int) -> tuple[Tensor, Tensor]:
        seed = (settings.seed * 1_000_000 + step) * WORLD_SIZE + rank
        return batch(training_text, settings.batch, settings.context, seed)

    result: dict = {"validation": {}, "sides": {}}
    if stage.warm_up:
        result["warm-up losses"] = warm_up(stage, rank, batch_of_step)
    model = new_model(settings)
    model.load_state_dict(torch.load(stage.start, weights_only=True))
    masks = prune(model, settings.sparsity)
    if stage.warm_up:  # these losses are the same in every stage
        result["validation"]["after the warm-up"] = mean_loss(model, validation)
    sides = make_pair(model, masks, stage)
    if stage.warm_up:
        result["validation"]["just pruned"] = mean_loss(model, validation)

    def on_step(side: Side) -> None:
        report_progress(stage=stage.name, side=side.name, loss=side.losses[-1])

    train_in_turn(
        sides,
        range(settings.warmup, settings.warmup + stage.steps),
        batch_of_step,
        stage.interface,
        on_step,
    )
    for side in sides:
        result["validation"][side.name] = mean_loss(side.module, validation)
        wrong = pruned_weights_left(side, masks)
        if wrong:
            raise AssertionError(f"{side.name}: {wrong} pruned weights are not 0, expected none")
        result["sides"][side.name] = {
            "losses": side.losses,
            "timings": side.timings,
            "wire bytes": side.wire_bytes,
            "state bytes": state_bytes(side),
        }
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result["pruned"] = sum(int((~mask).sum()) for mask in masks.values())
    result["largest weight difference"] = largest_difference(*sides)
    leave()
    return result


def new_model(settings: Settings) -> GPT:
    torch.manual_seed(settings.seed)
    return GPT(settings.layers, settings.width, settings.context)


def warm_up(stage: Stage, rank: int, batch_of_step: BatchOfStep) -> list[float]:
    """Train the dense model a little, so that magnitudes mean something; returns the losses."""
    side = make_side("dense", new_model(stage.settings), stage)
    for step in range(stage.settings.warmup):
        train_step(side, *batch_of_step(step))
        report_progress(stage="warm-up", side=side.name, loss=side.losses[-1])
    if rank == 0:
        torch.save(side.module.state_dict(), stage.start)
    dist.barrier()  # the file is written before any rank reads it
    return side.losses


def prune(model: GPT, sparsity: float) -> dict[str, Tensor]:
    """Masks of the weight matrices of the transformer blocks; the rest stays dense."""
    return sparse_comm.prune.magnitude(
        model,
        sparsity=sparsity,
        scope="global",
        names=lambda name, parameter: name.startswith("blocks."),
    )


def largest_difference(dense: Side, compact: Side) -> float:
    """Largest difference between any two weights of the two trainings."""
    expected = dense.module.state_dict()
    got = sparse_comm.dense_state_dict(compact.module)
    return max(float((got[name] - weight).abs().max()) for name, weight in expected.items())


if __name__ == "__main__":
    rank_main(main)
