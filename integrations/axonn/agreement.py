"""What all ranks agree upon before a step sends anything."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from .modules import config
from .start import state

__all__ = ["agreed_count"]


def agreed_count(count: Callable[[], int], eval_mode: bool) -> int:
    """The number of micro-batches of this step. A collective of all ranks.

    Args:
        count: gives this rank's number, or raises.
        eval_mode: whether this rank evaluates.

    Raises:
        Exception: of ``count``, on the ranks where it failed.
        ValueError: on the others, or where the stages of a pipeline differ.
    """
    failure: Exception | None = None
    mine = -1
    try:
        mine = count()
    except Exception as error:
        failure = error
    if dist.get_world_size() > 1:
        own = torch.tensor([mine, int(eval_mode)], device=state().device)
        all_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, own)
        said = torch.stack(all_ranks).tolist()
    else:
        said = [[mine, int(eval_mode)]]
    if failure is not None:
        raise failure
    if failed := [rank for rank, (number, _) in enumerate(said) if number < 0]:
        raise ValueError(f"the batch of rank {failed[0]} was refused there: see what it says")
    grid = torch.arange(len(said)).reshape(-1, config.G_inter, config.G_intra)
    for pipeline in grid.transpose(1, 2).reshape(-1, config.G_inter).tolist():
        steps = [said[rank] for rank in pipeline]
        if any(step != steps[0] for step in steps):
            texts = ", ".join(
                f"rank {rank} {'evaluates' if evaluates else 'trains on'} {number} micro-batches"
                for rank, (number, evaluates) in zip(pipeline, steps, strict=True)
            )
            raise ValueError(f"the stages of a pipeline do different things: {texts}")
    return mine
