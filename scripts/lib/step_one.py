"""The one process of ``bench_step.py`` without a network: the warm-up, and what compaction costs.

One call with ``job["densities"]`` and ``job["computes"]``: trains the dense model a little and
files its weights as ``job["start"]``; then, for each of both, masked dense and compact training
take turns step by step.
"""

from pathlib import Path
from random import Random

import torch

from sparse_comm import kernels

from .job import read_job
from .launch import rank_main, report_progress
from .step_peers import Peer, adamw, alone, computing
from .step_start import CONTEXT, SIZE, Data, new_model, pruned_start, pruned_weights_left

UNTIMED = 2  # steps of each at the start
SIDES = 3  # that take turns


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each side, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    data = Data(job)
    losses = warm_up(job, data)
    sections = []
    for density in job["densities"]:
        model, masks = pruned_start(job | {"density": density})
        for compute in job["computes"]:
            sides = list(computing(alone(model, masks, compute), compute))
            assert len(sides) == SIDES
            measured = train_in_turn(sides, job, data)
            for side, facts in zip(sides, measured, strict=True):
                facts["pruned_weights_left"] = pruned_weights_left(side, masks)
            sections.append({"density": density, "compute": compute, "sides": measured})
    return {"warm_up_losses": losses, "sections": sections}


def warm_up(job: dict, data: Data) -> list[float]:
    """Train the dense model, so that magnitudes mean something, and file it; returns losses."""
    model = new_model(job)
    optimizer = adamw(model)
    losses = []
    for step in range(job["warm_up"]):
        loss = model(*data.batch(step, SIZE, CONTEXT))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        report_progress(side="warm-up")
    torch.save(model.state_dict(), job["start"])
    return losses


def train_in_turn(sides: list[Peer], job: dict, data: Data) -> list[dict]:
    """One step of each, on equal batches, in an order that changes; then the next.

    Returns:
        For each the "losses" of all steps, and of the timed ones the seconds of each of the
        "phases", and those in the "pack" and "expand" kernels.
    """
    measured: list[dict] = [{"kind": side.kind, "losses": [], "phases": []} for side in sides]
    for step in range(UNTIMED + job["repeats"]):
        batch = data.batch(job["warm_up"] + step, SIZE, CONTEXT)
        turns = list(zip(sides, measured, strict=True))
        Random(step).shuffle(turns)
        for side, facts in turns:
            seconds = {"pack": 0.0, "expand": 0.0}

            def add(name: str, length: float, seconds: dict[str, float] = seconds) -> None:
                seconds[name] += length

            stop = kernels.observe(add)
            loss, phases = side.step(*batch)
            stop()
            facts["losses"].append(loss)
            if step >= UNTIMED:
                facts["phases"].append(phases | seconds)
            report_progress(side=side.kind)
    return measured


if __name__ == "__main__":
    rank_main(main)
