"""The two sides of the comparison, dense with masks and compact, and how they are timed."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparse_comm
from sparse_comm.reduce import bucket_cap_mb, measure_link

from .comm import CommRecorder
from .netns import transmitted_bytes
from .settings import Stage

BLOCK = 10  # steps that one side makes before it is the other's turn
UNTIMED = 2  # steps at a block's start that are not timed: caches are cold, DDP rebuilds buckets

BatchOfStep = Callable[[int], tuple[Tensor, Tensor]]


@dataclass
class Side:
    """One of the two trainings, and what was measured of it."""

    name: str
    module: nn.Module
    ddp: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    recorder: CommRecorder
    after_step: Callable[[], None]
    losses: list[float] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)  # per step, one entry a block


def make_side(
    name: str,
    module: nn.Module,
    stage: Stage,
    after_step: Callable[[], None] | None = None,
) -> Side:
    """DDP and AdamW as anyone would set them up: the same for the dense and the compact model."""
    dtype = getattr(torch, stage.reduce_dtype) if stage.reduce_dtype else None
    bucket_mb = stage.bucket_mb or chosen_bucket_mb(module, dtype or torch.float32)
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb)
    groups = sparse_comm.param_groups(module, stage.settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=stage.settings.learning_rate, fused=True)
    recorder = CommRecorder(ddp, dtype)
    return Side(name, module, ddp, optimizer, recorder, after_step or (lambda: None))


def chosen_bucket_mb(module: nn.Module, dtype: torch.dtype) -> float:
    """DDP's ``bucket_cap_mb`` for fp32 gradients that travel in ``dtype``, by the link's speed."""
    entries = sum(parameter.numel() for parameter in module.parameters())
    wire = bucket_cap_mb(measure_link(dtype=dtype), entries * dtype.itemsize)
    return wire * torch.float32.itemsize / dtype.itemsize


def make_pair(model: nn.Module, masks: dict[str, Tensor], stage: Stage) -> tuple[Side, Side]:
    """Two equal pruned models: one that keeps its zeros by masking, one that is compact."""
    # The leanest mask that we know of: one fp32 multiplication of each weight after the step.
    # (Masking the gradient as well, or multiplying by a bool mask, is slower.)
    factors = {name: mask.float() for name, mask in masks.items()}

    @torch.no_grad()
    def mask_weights() -> None:
        for name, factor in factors.items():
            model.get_parameter(name).mul_(factor)

    mask_weights()
    compact = sparse_comm.compact(copy.deepcopy(model), masks, weights=stage.settings.weights)
    sparse_comm.check_masks(compact)
    return (
        make_side("dense", model, stage, mask_weights),
        make_side("compact", compact, stage),
    )


def train_in_turn(
    sides: tuple[Side, ...],
    steps: range,
    batch_of_step: BatchOfStep,
    interface: str,
    on_step: Callable[[Side], None],
) -> None:
    """Train each side for all steps, in alternating blocks so that noise hits both alike."""
    for first in range(0, len(steps), BLOCK):
        block = steps[first : first + BLOCK]
        for side in sides:
            for step in block[:UNTIMED]:
                train_step(side, *batch_of_step(step))
                on_step(side)
            timed = block[UNTIMED:]
            sent_before = _sent_bytes(interface)
            for step in timed:
                side.timings.append(train_step(side, *batch_of_step(step)))
                on_step(side)
            sent_after = _sent_bytes(interface)
            if timed and sent_before is not None and sent_after is not None:
                side.wire_bytes.append((sent_after - sent_before) / len(timed))


def _sent_bytes(interface: str) -> int | None:
    dist.barrier()  # all ranks have sent what they had to send
    return transmitted_bytes(interface)


def train_step(side: Side, tokens: Tensor, targets: Tensor) -> dict[str, float]:
    """One step; returns its times in seconds."""
    side.optimizer.zero_grad()
    dist.barrier()  # start together: waiting for a late peer is not communication
    start = time.perf_counter()
    loss = side.ddp(tokens, targets)
    side.recorder.start_step()
    loss.backward()
    communication, exposed = side.recorder.end_step()
    side.optimizer.step()
    side.after_step()
    step_time = time.perf_counter() - start
    side.losses.append(loss.item())
    return {"step": step_time, "communication": communication, "exposed": exposed}


@torch.no_grad()
def mean_loss(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches, without DDP: every rank takes batches of its own."""
    return sum(module(*batch).item() for batch in batches) / len(batches)


def state_bytes(side: Side) -> dict[str, int]:
    """Bytes of one rank's model state, counted from the tensors that are alive after a step.

    Gradients are views into DDP's buckets, so they count once. The dense side's masks are left
    out, although that training needs them: how they are kept is the user's choice.
    """
    parameters = list(side.module.parameters())
    state = [tensor for slot in side.optimizer.state.values() for tensor in slot.values()]
    pattern, cache = _pattern_and_cache_bytes(side)
    return {
        "parameters": sum(parameter.nbytes for parameter in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer state": sum(tensor.nbytes for tensor in state),
        "pattern": pattern,
        "cached dense weights": cache,
    }


def _pattern_and_cache_bytes(side: Side) -> tuple[int, int]:
    """What compact keeps beside parameters, gradients and optimizer state."""
    if not sparse_comm.is_compact(side.module):
        return 0, 0
    summary = sparse_comm.summary(side.module, side.optimizer)
    return summary.pattern_bytes, summary.cache_bytes


def pruned_weights_left(side: Side, masks: dict[str, Tensor]) -> int:
    """How many pruned weights are not exactly zero."""
    weights = sparse_comm.dense_state_dict(side.module)
    return sum(int(weights[name][~mask].count_nonzero()) for name, mask in masks.items())
