"""One rank of ``bench_transport.py``."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sparse_comm.integrations import axonn as sparse_axonn
from sparse_comm.integrations.axonn.start import state
from sparse_comm.integrations.axonn.transport import Transport
from torch import Tensor, nn

from .bench import RANKS, take_turns
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .transport_kinds import BYTES, ENGINE, NOTHING, OURS, RAW

VOLUME = 64 << 20  # bytes a turn, but at most MOST messages
MOST = 256
MICRO_BATCHES = 64
WIDTH = 8


class Stage(nn.Sequential):
    """Computes next to nothing."""

    def get_input_shape(self) -> list[int]:
        return [-1, WIDTH]

    def get_output_shape(self) -> list[int]:
        return [-1, WIDTH]


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns the seconds of each turn, by side."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(RANKS)
    join(workdir, rank, RANKS)
    sparse_axonn.init(G_inter=RANKS)
    transport = state().transport
    assert transport is not None
    counts = {nbytes: min(VOLUME // nbytes, MOST) for nbytes in BYTES}
    sides: dict[str, Any] = {}
    for nbytes, count in counts.items():
        sides[f"{RAW} {nbytes}"] = raw(rank, nbytes, count)
        sides[f"{OURS} {nbytes}"] = ours(rank, nbytes, count, transport)
    for side in sides.values():
        side(lambda: None)  # connections are made
    for name, step in ((ENGINE, pipeline()), (NOTHING, alone())):
        step()
        sides[name] = turn_of(step)
    turns = take_turns(sides, job["repeats"], job["interface"], lambda name: report_progress())
    sparse_axonn.shutdown()
    leave()
    return {
        "turns": {name: turn["seconds"] for name, turn in turns.items()},
        "counts": {str(nbytes): count for nbytes, count in counts.items()},
        "messages": 2 * MICRO_BATCHES,
    }


def raw(rank: int, nbytes: int, count: int) -> Callable[[Any], None]:
    tensor = torch.zeros(nbytes, dtype=torch.uint8)

    def side(start: Callable[[], None]) -> None:
        start()
        for _ in range(count):
            if rank == 0:
                dist.send(tensor, 1)
            else:
                dist.recv(tensor, 0)

    return side


def ours(rank: int, nbytes: int, count: int, transport: Transport) -> Callable[[Any], None]:
    tensors = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]

    def side(start: Callable[[], None]) -> None:
        start()
        if rank == 0:
            pending = [transport.send(tensors[n % 2], 1) for n in range(count)]
            for request in pending:
                request.Wait()
            return
        request = transport.receive(tensors[0], 0)
        for number in range(count):  # the next is asked for before this one is used
            transport.first([request])
            if number + 1 < count:
                request = transport.receive(tensors[(number + 1) % 2], 0)

    return side


def pipeline() -> Callable[[], Any]:
    """A step of two stages."""
    stage = Stage(nn.Linear(WIDTH, WIDTH, bias=False))
    engine = sparse_axonn.InterLayerEngine(
        stage, F.mse_loss, torch.float32, micro_batch_size=1, bucket_cap_mb=1.0
    )
    optimizer = torch.optim.SGD(stage.parameters(), 0.01)
    x: Tensor = torch.ones(MICRO_BATCHES, WIDTH)
    return lambda: engine.forward_backward_optimizer(x, x, optimizer)


def alone() -> Callable[[], Any]:
    """The same work in one process, without an engine."""
    model = Stage(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x: Tensor = torch.ones(MICRO_BATCHES, WIDTH)

    def step() -> None:
        for part in x.split(1):
            loss = F.mse_loss(model(part), part)
            loss.item()
            (loss / MICRO_BATCHES).backward()
        optimizer.step()

    return step


def turn_of(step: Callable[[], Any]) -> Callable[[Any], None]:
    def side(start: Callable[[], None]) -> None:
        start()
        step()

    return side


if __name__ == "__main__":
    rank_main(main)
