"""The trainings that ``bench_step.py`` compares: one pruned model, its gradients reduced in turn.

Every peer is a whole training: its own copy of the fp32 weights, its optimizer (fused AdamW), and
what keeps its pruned weights at zero. All compute in fp32, or all in bf16 under torch.autocast;
they differ in what they send and store.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from sparse_comm.integrations.pytorch import distributed_data_parallel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sparse_comm
from baselines import powersgd
from baselines.coo import all_reduce_coo
from baselines.dense import BUCKET_MB
from baselines.samo import Samo
from sparse_comm.compact.slot import Mode
from sparse_comm.reduce import Reduction, reduce_hook

from .bench import RANKS
from .model import GPT
from .step_kinds import (
    CACHED,
    COMPUTE_BF16,
    COMPUTE_FP32,
    COO,
    DENSE_BF16,
    DENSE_BF16_TUNED,
    DENSE_FP32,
    MASKED_DENSE,
    OURS,
    OURS_FP32,
    OURS_TRANSIENT,
    POWERSGD,
    SAMO_BF16,
    SAMO_FP32,
    TRANSIENT,
    Phases,
)

LEARNING_RATE = 5e-4
WEIGHT_DECAY = 0.1
COMPUTE_DTYPE = {COMPUTE_FP32: None, COMPUTE_BF16: torch.bfloat16}  # an argument of ``compact``
INT64, FP32, BF16 = 8, 4, 2  # bytes
MIB = 2**20


def nothing() -> None:
    """For what a peer need not do."""


class Peer:
    """One training; it computes in fp32 unless ``compute`` says otherwise.

    Args:
        kind: its name in tables.
        module: holds the weights.
        model: what is called: ``module``, or DDP around it.
        update: the optimizer's step, with all that it needs to reach the dense weights.
        payload: bytes of gradients that a rank has to send in a step, by the formula: with two
            ranks, an all-reduce sends as much as it reduces.
        reduce: averages the gradients over the ranks after backward, where DDP does not.
        mask: sets pruned weights to zero again.
    """

    def __init__(
        self,
        kind: str,
        module: GPT,
        model: nn.Module,
        update: Callable[[], None],
        payload: int = 0,
        reduce: Callable[[], None] = nothing,
        mask: Callable[[], None] = nothing,
    ) -> None:
        self.kind, self.module, self.model, self.payload = kind, module, model, payload
        self._update, self._reduce, self._mask = update, reduce, mask
        self.compute = COMPUTE_FP32
        self._computed = 0.0  # when backward had computed all but the embeddings' gradients
        module.token_embedding.register_forward_hook(self._watch_backward)

    @property
    def bucket_mb(self) -> float | None:
        """Limit of DDP's buckets in MiB of fp32 gradients; None without DDP."""
        if not isinstance(self.model, DistributedDataParallel):
            return None
        bucket_bytes: int = self.model.bucket_bytes_cap
        return bucket_bytes / MIB

    def step(self, tokens: Tensor, targets: Tensor) -> tuple[float, Phases]:
        """One training step: its loss, and the seconds of its phases.

        "forward"; "backward" until only the embeddings' gradients are left to compute; "exposed"
        from there until all gradients are averaged, which is what the step waits for; "optimizer";
        "mask".
        """
        times = [time.perf_counter()]
        with self.autocast():
            loss = self.model(tokens, targets)
        times.append(time.perf_counter())
        loss.backward()
        self._reduce()
        times += [self._computed, time.perf_counter()]
        self._update()
        self.model.zero_grad()
        times.append(time.perf_counter())
        self._mask()
        times.append(time.perf_counter())
        names = ("forward", "backward", "exposed", "optimizer", "mask")
        lengths = [end - start for start, end in pairwise(times)]
        return loss.item(), dict(zip(names, lengths, strict=True))

    def autocast(self) -> torch.autocast:
        """The context in which its modules compute."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.compute == COMPUTE_BF16)

    def held_out_loss(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Mean over this rank's batches, without DDP."""
        with torch.no_grad(), self.autocast():
            return fmean(self.module(*batch).item() for batch in batches)

    def _watch_backward(self, embedding: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._note_time)

    def _note_time(self, gradient: Tensor) -> None:
        self._computed = time.perf_counter()


def adamw(module: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> torch.optim.AdamW:
    """Of all parameters of the module, or of these; matrices decay."""
    groups = sparse_comm.param_groups(module, WEIGHT_DECAY)
    if parameters is not None:
        chosen = set(parameters)
        groups = [
            group | {"params": [each for each in group["params"] if each in chosen]}
            for group in groups
        ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def masking(module: nn.Module, factors: Mapping[str, Tensor]) -> Callable[[], None]:
    """The leanest way to mask that we know of: one fp32 multiplication of each weight."""

    @torch.no_grad()
    def mask() -> None:
        for name, factor in factors.items():
            module.get_parameter(name).mul_(factor)

    return mask


def bytes_of(module: nn.Module, itemsize: int) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) * itemsize


# --- on one process ------------------------------------------------------------------------------


def computing(peers: Iterable[Peer], compute: str) -> Iterator[Peer]:
    """The peers, having been told what to compute in."""
    for peer in peers:
        peer.compute = compute
        yield peer


def alone(start: GPT, masks: Mapping[str, Tensor], compute: str) -> Iterator[Peer]:
    """Masked dense training without a network, then compact training in both modes."""
    module = copy.deepcopy(start)
    factors = {name: mask.float() for name, mask in masks.items()}
    update = adamw(module).step
    yield Peer(MASKED_DENSE, module, module, update, mask=masking(module, factors))
    modes: dict[str, Mode] = {CACHED: "cached", TRANSIENT: "transient"}
    for kind, mode in modes.items():
        module = copy.deepcopy(start)
        sparse_comm.compact(module, masks, weights=mode, compute_dtype=COMPUTE_DTYPE[compute])
        yield Peer(kind, module, module, adamw(module).step)


# --- on two --------------------------------------------------------------------------------------


def make_peers(start: GPT, masks: Mapping[str, Tensor], compute: str) -> Iterator[Peer]:
    """All of KINDS, from the weights of ``start``, whose pruned entries are zero."""
    # One set of factors for all that are masked: they would take 4 bytes a parameter each.
    factors = {name: mask.float() for name, mask in masks.items()}
    for kind in (DENSE_FP32, DENSE_BF16, DENSE_BF16_TUNED, POWERSGD):
        yield dense(kind, copy.deepcopy(start), factors)
    yield coo(copy.deepcopy(start), masks)
    yield samo(SAMO_FP32, copy.deepcopy(start), masks)
    yield samo(SAMO_BF16, copy.deepcopy(start), masks)
    dtype = COMPUTE_DTYPE[compute]
    yield compact(OURS_FP32, copy.deepcopy(start), masks, "cached", None, dtype)
    yield compact(OURS, copy.deepcopy(start), masks, "cached", torch.bfloat16, dtype)
    yield compact(OURS_TRANSIENT, copy.deepcopy(start), masks, "transient", torch.bfloat16, dtype)


def dense(kind: str, module: GPT, factors: Mapping[str, Tensor]) -> Peer:
    """DDP over masked weights: its gradients travel whole."""
    payload = bytes_of(module, BF16 if kind in (DENSE_BF16, DENSE_BF16_TUNED) else FP32)
    if kind == POWERSGD:
        ddp = powersgd.powersgd_ddp(module)
        payload = powersgd.bytes_sent(module)
    elif kind == DENSE_BF16_TUNED:
        ddp = distributed_data_parallel(module, reduction=Reduction(torch.bfloat16))
    else:
        ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
        if kind == DENSE_BF16:  # torch's own bf16_compress_hook refuses gloo
            ddp.register_comm_hook(Reduction(torch.bfloat16), reduce_hook)
        assert ddp.bucket_bytes_cap == BUCKET_MB * MIB
    return Peer(kind, module, ddp, adamw(module).step, payload, mask=masking(module, factors))


def compact(
    kind: str,
    module: GPT,
    masks: Mapping[str, Tensor],
    weights: Mode,
    wire: torch.dtype | None,
    compute_dtype: torch.dtype | None,
) -> Peer:
    """Ours: gradients are compact and travel in ``wire``, None for fp32."""
    sparse_comm.compact(module, masks, weights=weights, compute_dtype=compute_dtype)
    ddp = distributed_data_parallel(module, reduction=Reduction(wire))
    payload = bytes_of(module, wire.itemsize if wire else FP32)
    return Peer(kind, module, ddp, adamw(module).step, payload)


class HalfCollectiveSamo(Samo):
    """SAMO's half-precision collective for a model whose gradients are fp32."""

    def all_reduce(self) -> None:
        halves = [layer.half_gradient.bfloat16() for layer in self.layers.values()]
        works = [dist.all_reduce(half, async_op=True) for half in halves]
        for layer, half, work in zip(self.layers.values(), halves, works, strict=True):
            work.wait()
            layer.half_gradient.copy_(half)


def samo(kind: str, module: GPT, masks: Mapping[str, Tensor]) -> Peer:
    """SAMO as published, but for weights and gradients in fp32, as with all peers here."""
    matrices = partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    state = (HalfCollectiveSamo if kind == SAMO_BF16 else Samo)(module, masks, matrices)
    dtype = torch.bfloat16 if kind == SAMO_BF16 else torch.float32
    others = [parameter for name, parameter in module.named_parameters() if name not in masks]
    optimizer = adamw(module, others)

    def reduce() -> None:
        state.all_reduce()
        average(others, dtype)

    def update() -> None:
        state.step()
        optimizer.step()

    entries = sum(layer.master.numel() for layer in state.layers.values())
    payload = (entries + sum(parameter.numel() for parameter in others)) * dtype.itemsize
    return Peer(kind, module, module, update, payload, reduce)


def coo(module: GPT, masks: Mapping[str, Tensor]) -> Peer:
    """torch's sparse all-reduce of the unpruned entries, then a dense optimizer.

    Pruned entries get a gradient of zero, with which AdamW leaves a weight of zero as it is: there
    is nothing to mask.
    """
    pruned = [module.get_parameter(name) for name in masks]
    indices = [mask.flatten().nonzero().flatten() for mask in masks.values()]
    others = [parameter for name, parameter in module.named_parameters() if name not in masks]

    def reduce() -> None:
        gradients = [parameter.grad for parameter in pruned if parameter.grad is not None]
        sums = all_reduce_coo(gradients, indices)
        for gradient, index, layer in zip(gradients, indices, sums, strict=True):
            gradient.zero_().view(-1).index_copy_(0, index, layer.coalesce().values() / RANKS)
        average(others, torch.float32)

    entries = sum(len(index) for index in indices)
    payload = entries * (INT64 + FP32) + FP32 * sum(parameter.numel() for parameter in others)
    return Peer(COO, module, module, adamw(module).step, payload, reduce)


def average(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    """Average the gradients of a few small parameters in one collective."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]).to(dtype)
    dist.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient)).div_(RANKS)
