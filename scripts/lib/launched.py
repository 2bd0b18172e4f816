"""What ``measure_launch.py`` launches: a small pipeline with replicas trains, or one rank fails.

python -m torch.distributed.run --nproc-per-node 4 -m lib.launched OUT STEPS [RANK_THAT_FAILS]
"""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

import sparse_comm

GRID = 2, 2  # stages, replicas
WIDTH, BATCH, MICRO_BATCH = 64, 16, 4
FAILS_IN = 2  # step


class Stage(nn.Sequential):
    def get_input_shape(self) -> list[int]:
        return [-1, WIDTH]

    get_output_shape = get_input_shape


def main() -> None:
    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    fails = [int(rank) for rank in sys.argv[3:]]
    sparse_axonn.init(*GRID)
    torch.manual_seed(0)
    stage = Stage(nn.Linear(WIDTH, WIDTH), nn.GELU())
    masks = sparse_comm.prune.magnitude(stage, sparsity=0.9, scope="layer")
    engine = sparse_axonn.InterLayerEngine(
        stage,
        nn.functional.mse_loss,
        computation_dtype=torch.bfloat16,
        sparse=True,
        masks={in_whole(name): mask for name, mask in masks.items()},
        names=in_whole,
        micro_batch_size=MICRO_BATCH,
    )
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
    rank = dist.get_rank()
    for step in range(steps):
        if step == FAILS_IN and rank in fails:
            stage.register_forward_pre_hook(lambda *args: fail(out))
        x = torch.randn(BATCH, WIDTH)
        optimizer.zero_grad()
        engine.forward_backward_optimizer(x, x, optimizer)
    (out / f"trained{rank}").write_text(f"{time.time()}")
    sparse_axonn.shutdown()


def in_whole(name: str) -> str:
    return f"{ax.config.inter_layer_parallel_rank}.{name}"


def fail(out: Path) -> Tensor:
    (out / "failed").write_text(f"{time.time()}")
    raise RuntimeError("as it was told to")


if __name__ == "__main__":
    main()
