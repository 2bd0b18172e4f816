"""What all ranks agree upon before an engine, or a step of it, sends anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_comm.mask_sync import gather, on_all_ranks

from .modules import config
from .start import state

__all__ = ["agreed_count", "check_arguments", "check_shapes", "compare_options", "micro_batches"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def micro_batches(batch: Tensor, labels: Any) -> int:
    """How many of this rank's batch; refuses what no step can begin with."""
    size = config.micro_batch_size
    if state().stepping:
        raise RuntimeError(
            "an earlier step has failed, and what other stages sent for it may be under way: "
            "start the program anew, from a checkpoint"
        )
    if size < 1:
        raise ValueError(
            "the size of a micro-batch is unknown: give InterLayerEngine(…, "
            "micro_batch_size=…), or make the loader by AxoNN's create_dataloader"
        )
    given = [("batch", len(batch))]
    if config.inter_layer_parallel_rank == config.G_inter - 1:  # which alone reads them
        given.append(("labels", len(labels)))
    for what, number in given:
        if number == 0 or number % size or number != len(batch):
            raise ValueError(
                f"{what} of {number} samples: expected a multiple of the micro-batch size "
                f"{size}" + (f", as many as the batch has, {len(batch)}" * (what == "labels"))
            )
    return len(batch) // size


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
    if failed := [rank for rank, (number, _) in enumerate(said) if number < 0]:
        reasons = gather(str(failure))
        if failure is not None:
            raise failure
        raise ValueError(f"rank {failed[0]} refused its batch: {reasons[failed[0]]}")
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


def check_arguments(model: Any, dtype: Any, sparse: bool, masks: Any) -> None:
    """Refuse what no engine can do, of this rank alone."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype not in DTYPES:
        raise ValueError(f"computation_dtype must be one of {DTYPES}, got {dtype!r}")
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"stage {config.inter_layer_parallel_rank} of {config.G_inter} has no parameters: give "
            "each stage some layers, or use fewer stages (G_inter)"
        )
    if masks is not None and not sparse:
        raise ValueError("masks are given, but not sparse=True")
    if config.G_inter > 1:
        for method in ("get_input_shape", "get_output_shape"):
            if not callable(getattr(model, method, None)):
                raise TypeError(
                    f"{type(model).__name__} has no method {method}(), by which AxoNN knows what "
                    "stages send each other: the shape, with -1 for the micro-batch"
                )


def compare_options(**options: Any) -> None:
    """Refuse engines whose options differ between ranks, which would not meet. A collective."""
    said = gather({name: str(value) for name, value in options.items()})
    for name in options:
        values = list(dict.fromkeys(own[name] for own in said))
        if len(values) > 1:
            raise ValueError(f"{name} differs between ranks: {' and '.join(values)}")


def check_shapes(model: nn.Module) -> None:
    """Refuse stages that would not understand each other. A collective."""
    if config.G_inter == 1:
        return
    stage = config.inter_layer_parallel_rank

    def own() -> tuple[Any, Any]:
        # The first gets no activations, and the last no gradients: theirs are not looked at.
        into = None if stage == 0 else tuple(model.get_input_shape())  # type: ignore[operator]
        last = stage == config.G_inter - 1
        return into, None if last else tuple(model.get_output_shape())  # type: ignore[operator]

    shapes = dict(gather((stage, on_all_ranks(own)), state().pipeline))
    wrong = [
        f"stage {n} gives {shapes[n][1]}, stage {n + 1} takes {shapes[n + 1][0]}"
        for n in range(config.G_inter - 1)
        if shapes[n][1] != shapes[n + 1][0]
    ]

    def check() -> None:
        if wrong:
            raise ValueError(f"shapes of neighbouring stages differ: {'; '.join(wrong)}")

    on_all_ranks(check)
