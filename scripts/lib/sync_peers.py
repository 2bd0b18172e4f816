"""The ways to reduce gradients that ``bench_sync.py`` compares, over one set of gradients."""

# No `from __future__ import annotations` in this file: DDP compares the hook's annotations with
# the classes and refuses their names.

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from baselines.coo import all_reduce_coo
from baselines.dense import BUCKET_MB, all_reduce_in_buckets
from baselines.powersgd import COLLECTIVES, PLAIN_STEPS, bytes_sent, powersgd_ddp
from baselines.samo import Samo
from sparse_comm import SparsityPattern, kernels

from .bench import RANKS, Side, Start

INT64, FP32 = 8, 4  # bytes


@dataclass
class Peer:
    """One way to sum all gradients over the ranks.

    Attributes:
        run: sums them; a side of ``take_turns``.
        averages: after a run, the averages of each layer: dense, or of the unpruned entries.
        payload: bytes that a rank has to send, by the formula: with two ranks, an all-reduce
            sends as much as it reduces.
        collectives: calls of the collective that a sync takes.
        warm_up: runs before the first that shows what the peer does.
    """

    run: Side
    averages: Callable[[], list[Tensor]]
    payload: int
    collectives: int
    warm_up: int = 0


class Gradients:
    """Gradients of all layers in fp32 and in bf16, each in one buffer, as DDP keeps them."""

    def __init__(self, layers: list[Tensor]) -> None:
        self.shapes = [layer.shape for layer in layers]
        self.fp32 = torch.cat([layer.flatten() for layer in layers])
        self.bf16 = self.fp32.bfloat16()

    def layers(self, flat: Tensor) -> list[Tensor]:
        """Views of ``flat``, one a layer."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


def dense(gradients: Gradients, source: Tensor) -> Peer:
    """Bucketed all-reduce of ``source``, which is one of the gradients' two buffers."""
    buffer = torch.empty_like(source)

    def run(start: Start) -> None:
        buffer.copy_(source)
        start()
        all_reduce_in_buckets(buffer)

    def averages() -> list[Tensor]:
        return [layer / RANKS for layer in gradients.layers(buffer)]

    return Peer(run, averages, buffer.nbytes, math.ceil(buffer.nbytes / (BUCKET_MB << 20)))


def packed(
    gradients: Gradients, source: Tensor, patterns: list[SparsityPattern], bucket_mb: float
) -> Peer:
    """Ours: pack layer by layer, and hand over each bucket as soon as it is full."""
    # Tried as well, and no faster on any link: two process groups in turn, a thread that packs,
    # one collective in flight at a time. At 1 Gbit/s the collectives alone take as long as this.
    buckets = _fill_buckets(gradients.layers(source), patterns, bucket_mb)

    def run(start: Start) -> None:
        start()
        works = []
        for buffer, parts in buckets:
            for layer, pattern, values in parts:
                kernels.pack(layer, pattern, out=values)
            works.append(dist.all_reduce(buffer, async_op=True))
        for work in works:
            work.wait()

    def averages() -> list[Tensor]:
        return [values / RANKS for _, parts in buckets for _, _, values in parts]

    return Peer(run, averages, sum(buffer.nbytes for buffer, _ in buckets), len(buckets))


Bucket = tuple[Tensor, list[tuple[Tensor, SparsityPattern, Tensor]]]


def _fill_buckets(
    layers: list[Tensor], patterns: list[SparsityPattern], bucket_mb: float
) -> list[Bucket]:
    """Buffers of at most ``bucket_mb`` (or one layer), each with its layers and their places."""
    limit = bucket_mb * 2**20 / layers[0].itemsize
    groups: list[list[int]] = []
    filled = 0
    for index, pattern in enumerate(patterns):
        if not groups or filled + pattern.nnz > limit:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += pattern.nnz
    buckets = []
    for group in groups:
        sizes = [patterns[index].nnz for index in group]
        buffer = layers[0].new_empty(sum(sizes))
        places = buffer.split(sizes)
        parts = [(layers[i], patterns[i], place) for i, place in zip(group, places, strict=True)]
        buckets.append((buffer, parts))
    return buckets


def samo(
    gradients: Gradients, model: nn.Module, masks: list[Tensor], reduce_dtype: torch.dtype
) -> Peer:
    """SAMO as published: compress all layers, then one collective a layer."""
    names = [name for name, _ in model.named_parameters()]
    adam = partial(torch.optim.AdamW, fused=True)
    state = Samo(model, dict(zip(names, masks, strict=True)), adam, reduce_dtype)
    sources = gradients.layers(gradients.bf16)

    def run(start: Start) -> None:
        start()
        for layer, source in zip(state.layers.values(), sources, strict=True):
            layer.compress(source)
        state.all_reduce()

    def averages() -> list[Tensor]:
        fp32 = reduce_dtype == torch.float32
        reduced = [x.master.grad if fp32 else x.half_gradient for x in state.layers.values()]
        return [values / RANKS for values in reduced if values is not None]

    entries = sum(int(mask.sum()) for mask in masks)
    return Peer(run, averages, entries * reduce_dtype.itemsize, len(masks))


def coo(gradients: Gradients, masks: list[Tensor]) -> Peer:
    """torch's sparse all-reduce."""
    indices = [mask.flatten().nonzero().flatten() for mask in masks]
    sources = gradients.layers(gradients.fp32)
    reduced: list[Tensor] = []

    def run(start: Start) -> None:
        start()
        reduced[:] = all_reduce_coo(sources, indices)

    def averages() -> list[Tensor]:
        return [layer.coalesce().values() / RANKS for layer in reduced]

    entries = sum(len(index) for index in indices)
    return Peer(run, averages, entries * (INT64 + FP32), len(masks))


class Matrices(nn.Module):
    """Parameters of given shapes, whose backward delivers given gradients."""

    def __init__(self, shapes: list[torch.Size], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return _Deliver.apply(gradients, *self.layers)


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx, *_):
        return None, *ctx.gradients


def powersgd(gradients: Gradients) -> Peer:
    """PowerSGD through DDP. Its time starts when DDP calls the hook: all gradients stand ready."""
    started: list[Start] = []

    def timed(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        started.pop()()  # fails on a second bucket, which would go uncounted
        return powerSGD_hook(state, bucket)

    model = Matrices(gradients.shapes, torch.float32)
    ddp = powersgd_ddp(model, hook=timed)
    sources = gradients.layers(gradients.fp32)

    def run(start: Start) -> None:
        started.append(start)
        ddp.zero_grad()
        ddp(sources).backward()

    def averages() -> list[Tensor]:
        return [p.grad for p in model.parameters() if p.grad is not None]

    return Peer(run, averages, bytes_sent(model), COLLECTIVES, warm_up=PLAIN_STEPS)
