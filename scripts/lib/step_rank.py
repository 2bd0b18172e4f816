"""One rank of ``bench_step.py``: trains every peer in turn, and notes what each step took."""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .bench import RANKS
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .netns import transmitted_bytes
from .pair import BLOCK, UNTIMED, mean_loss
from .step_kinds import Phases
from .step_peers import computing, make_peers
from .step_start import Data, pruned_start, pruned_weights_left, unpruned_entries


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each peer, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    join(workdir, rank, RANKS)
    data = Data(job, rank)
    model, masks = pruned_start(job)
    start_loss = mean_loss(model, data.held_out)
    peers = list(computing(make_peers(model, masks, job["compute"]), job["compute"]))
    measured = train_in_turn(peers, job, data)
    for peer, facts in zip(peers, measured, strict=True):
        facts["payload"] = peer.payload
        facts["bucket_mb"] = peer.bucket_mb
        facts["held_out"] = peer.held_out_loss(data.held_out)
        facts["pruned_weights_left"] = pruned_weights_left(peer, masks)
    leave()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "unpruned": unpruned_entries(model, masks),
        "start_loss": start_loss,
        "peers": measured,
    }


class Training(Protocol):
    """What takes turns; it has a name."""

    kind: str

    def step(self, tokens: Tensor, targets: Tensor) -> tuple[float, Phases]:
        """One step: its loss, and the seconds of its phases."""
        ...


def train_in_turn(peers: Sequence[Training], job: dict, data: Data) -> list[dict]:
    """Train each peer for all steps, on equal batches, in blocks as ``pair.train_in_turn`` does.

    Returns:
        For each the "losses" of all steps, and of the timed ones the seconds of each of the
        "phases" and the "bytes" sent a step, one number a block.
    """
    measured: list[dict] = [
        {"kind": peer.kind, "losses": [], "phases": [], "bytes": []} for peer in peers
    ]
    for first in range(0, job["steps"], BLOCK):
        block = range(first, min(first + BLOCK, job["steps"]))
        turns = list(zip(peers, measured, strict=True))
        Random(first).shuffle(turns)  # alike on all ranks
        for peer, facts in turns:
            _train(peer, facts, block, job, data)
    return measured


def _train(peer: Training, facts: dict, block: range, job: dict, data: Data) -> None:
    """One block of steps of one peer."""
    sent_before = None
    for step in block:
        if step == block.start + UNTIMED:
            dist.barrier()  # the peer has sent what it had to send
            sent_before = transmitted_bytes(job["interface"])
        batch = data.batch(step, 1, job["tokens"])
        dist.barrier()  # start together
        loss, phases = peer.step(*batch)
        facts["losses"].append(loss)
        if step >= block.start + UNTIMED:
            facts["phases"].append(phases)
        report_progress(peer=peer.kind)
    dist.barrier()
    sent_after = transmitted_bytes(job["interface"])
    if sent_before is not None and sent_after is not None:
        facts["bytes"].append((sent_after - sent_before) / (len(block) - UNTIMED))


if __name__ == "__main__":
    rank_main(main)
