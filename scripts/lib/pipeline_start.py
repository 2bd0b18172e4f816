"""Trains a model of ``compare_comm.py --pipeline`` on one process, and prunes it."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparse_comm

from .images import fashion_mnist
from .job import read_job
from .launch import rank_main, report_progress
from .pipeline_models import ALL, CONTEXT, IMAGES, Row, loss_of
from .text import batch as text_batch
from .text import standard_library_text

LEARNING_RATE = 2e-3
CHANNELS = 0.5  # of the channels are pruned
SPARSITY = 0.9  # of the entries, those of pruned channels included
_WARM_BATCH = {True: 64, False: 16}  # images, texts


class Data:
    """Batches that depend on a seed only."""

    def __init__(self, name: str, images: str | None) -> None:
        self.is_images = name in IMAGES
        if self.is_images:
            assert images is not None
            self.train = fashion_mnist("train", Path(images))
            self.test = fashion_mnist("test", Path(images))
        else:
            self.text, self.held_out = standard_library_text()

    def batch(self, seed: int, size: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        if self.is_images:
            x, y = self.test if held_out else self.train
            chosen = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(seed))
            return x[chosen], y[chosen]
        return text_batch(self.held_out if held_out else self.text, size, CONTEXT, seed)


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Writes the trained layers' state and the masks to ``job["start"]``."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    model = ALL[job["model"]]
    layers = model.layers()
    data = Data(job["model"], job["images"])
    whole = Row(*layers)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=LEARNING_RATE)
    for step in range(job["warm_up"]):
        if step == job["warm_up"] // 2:  # the rest without what is pruned
            masks = pruned(whole, job["model"])
            sparse_comm.compact(whole, masks, optimizer=optimizer)
        x, y = data.batch(step, _WARM_BATCH[data.is_images])
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out, at_the_cut = _forward(whole, x, model.cuts[2][0])
        penalty = model.penalty * at_the_cut[-1].float().abs().mean() if model.penalty else 0.0
        (loss_of(out, y) + penalty).backward()
        optimizer.step()
        report_progress()
    zeros = [float((t == 0).float().mean()) for t in at_the_cut]
    state = {"layers": sparse_comm.dense_state_dict(whole), "masks": sparse_comm.masks_of(whole)}
    torch.save(state, job["start"])
    return {"zeros": zeros}


def _forward(whole: Row, x: Tensor, cut: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the tensors in front of a layer."""
    given: Any = (x,)
    between: tuple[Tensor, ...] = ()
    for number, layer in enumerate(whole):
        if number == cut:
            between = given
        out = layer(*given)
        given = out if isinstance(out, tuple) else (out,)
    return given[0], between


def pruned(whole: nn.Module, name: str) -> dict[str, Tensor]:
    """Half of the channels, and of the rest the smallest entries, until a tenth is left."""
    x = torch.zeros(1, 1, 28, 28) if name in IMAGES else torch.zeros(1, CONTEXT, dtype=torch.int64)
    masks = sparse_comm.prune.channels(whole, CHANNELS, example=x)
    for parameter_name, mask in masks.items():
        whole.get_parameter(parameter_name).data.mul_(mask)
    for parameter_name, mask in sparse_comm.prune.magnitude(whole, SPARSITY, scope="layer").items():
        known = masks.get(parameter_name)
        masks[parameter_name] = mask if known is None else mask & known
    return masks


if __name__ == "__main__":
    rank_main(main)
