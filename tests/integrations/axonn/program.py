"""A program that torchrun and mpirun run alike: it trains, and writes what it saw.

python -m torch.distributed.run --nproc-per-node 4 -m tests.integrations.axonn.program OUT 2 2
mpirun -n 4 python -m tests.integrations.axonn.program OUT 2 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from sparse_comm.integrations import axonn as sparse_axonn

from tests.integrations.axonn import models


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("G_inter", type=int)
    parser.add_argument("G_data", type=int)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fails-on", type=int, help="the rank that fails in its third forward")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sparse_axonn.init(options.G_inter, options.G_data, transport=options.transport)
    dtype = getattr(torch, options.dtype)
    engine = models.engine_of(models.masks_of_whole(), dtype=dtype)
    if options.fails_on == dist.get_rank():
        fail_later(engine.model)
    losses = models.train(engine, options.steps)
    transport = type(sparse_axonn.start.state().transport).__name__
    said = {"losses": losses, "transport": transport}
    (options.out / f"{dist.get_rank()}.json").write_text(json.dumps(said))


def fail_later(stage: torch.nn.Module) -> None:
    calls = 0

    def hook(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ZeroDivisionError("the reason why all ends")

    stage.register_forward_hook(hook)


if __name__ == "__main__":
    main()
