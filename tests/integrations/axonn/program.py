"""A program that torchrun and mpirun run alike: it trains, and writes what it saw.

python -m torch.distributed.run --nproc-per-node 4 -m tests.integrations.axonn.program OUT 2 2
mpirun -n 4 python -m tests.integrations.axonn.program OUT 2 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from axonn.inter_layer import AxoNN_Inter_Layer_Engine
from sparse_comm.integrations import axonn as sparse_axonn
from sparse_comm.integrations.axonn import InterLayerEngine
from sparse_comm.integrations.axonn.start import state

from tests.integrations.axonn import models


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("G_inter", type=int)
    parser.add_argument("G_data", type=int)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--fails-on", type=int, help="the rank that fails in its third forward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sparse_axonn.init(options.G_inter, options.G_data, transport=options.transport)
    transport = type(state().transport).__name__
    said = {"transport": transport, "losses": {}}
    for dtype in (torch.float32, torch.bfloat16):
        engine = models.engine_of(models.masks_of_whole(), dtype=dtype)
        if options.fails_on == dist.get_rank():
            fail_later(engine.model)
        said["losses"][str(dtype)] = models.train(engine, steps=20)
    for grid in ((4, 1), (1, 4)):  # stages in the middle, and none
        sparse_axonn.init(*grid, transport=options.transport)
        engine = models.engine_of(models.masks_of_whole())
        said["losses"][str(grid)] = models.train(engine, steps=6)
    sparse_axonn.init(4, 1, transport=options.transport)
    of_codecs = [
        models.train_relu(models.relu_engine(codec))
        for codec in ("dense", "channels", "zeros", "auto")
    ]
    said["codecs"] = of_codecs
    sparse_axonn.init(options.G_inter, options.G_data, transport=options.transport)
    if transport == "MPITransport":
        said |= {"dense": [train_dense(InterLayerEngine), train_dense(AxoNN_Inter_Layer_Engine)]}
        said |= {"odd": odd_message()}
    (options.out / f"{dist.get_rank()}.json").write_text(json.dumps(said))


def fail_later(stage: torch.nn.Module) -> None:
    calls = 0

    def hook(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("the reason why all ends")

    stage.register_forward_hook(hook)


def train_dense(engine_class: Any) -> list[float]:
    """By AxoNN's own engine, too: with what it needs, more than one micro-batch and even sizes."""
    stage = models.this_stage()
    ax.config.micro_batch_size = 2
    return models.train(engine_class(stage, F.cross_entropy, torch.bfloat16), steps=10)


def odd_message() -> bool:
    """A message of an odd number of 16-bit elements arrives."""
    transport, stage = state().transport, ax.config.inter_layer_parallel_rank
    assert transport is not None
    sent = torch.arange(7, dtype=torch.bfloat16)
    if stage == 0:
        transport.send(sent, 1).Wait()
        return True
    received = torch.zeros(7, dtype=torch.bfloat16)
    transport.receive(received, 0).Wait()
    return torch.equal(received, sent)


if __name__ == "__main__":
    main()
