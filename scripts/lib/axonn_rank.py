"""One rank of ``compare_comm.py --framework axonn``: engines of one pruned GPT train in turn."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

import sparse_comm
from baselines.axonn import ReleasedEngine
from sparse_comm.reduce.span import observe_spans

from . import axonn_phases
from .axonn_kinds import (
    BUCKETS,
    BUCKETS_AFTER,
    COMPACT,
    COMPACT_AFTER,
    KINDS,
    MASKED,
    RELEASED,
    RELEASED_BF16,
)
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT
from .netns import transmitted_bytes
from .pair import BLOCK, UNTIMED
from .step_kinds import TRANSIENT
from .step_peers import LEARNING_RATE, WEIGHT_DECAY
from .step_start import Data, pruned_start, unpruned_entries


class Stage(nn.Module):
    """A part of the GPT, by the names of the whole, with what AxoNN asks of a stage."""

    def __init__(self, model: GPT, number: int, count: int, length: int, width: int) -> None:
        super().__init__()
        first, last = number == 0, number == count - 1
        blocks = len(model.blocks)
        self.shape = [-1, length, width]
        if first:
            self.token_embedding = model.token_embedding
            self.position_embedding = model.position_embedding
        mine = range(blocks * number // count, blocks * (number + 1) // count)
        self.blocks = nn.ModuleDict({str(n): model.blocks[n] for n in mine})
        if last:
            self.norm, self.head = model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "token_embedding"):
            positions = torch.arange(x.shape[1], device=x.device)
            x = self.token_embedding(x) + self.position_embedding(positions)
        for block in self.blocks.values():
            x = block(x)
        return self.head(self.norm(x)) if hasattr(self, "head") else x

    def get_input_shape(self) -> list[int]:
        return self.shape

    def get_output_shape(self) -> list[int]:
        return self.shape


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each side, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    sizes = job["G_inter"], job["G_data"]
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[0] * sizes[1])
    join(workdir, rank, sizes[0] * sizes[1])
    sparse_axonn.init(*sizes)
    model, masks = pruned_start(job)
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "unpruned": unpruned_entries(model, masks),
        "stage": ax.config.inter_layer_parallel_rank,
        "replica": ax.config.data_parallel_rank,
    }
    data = Data(job, ax.config.data_parallel_rank)
    sides = [Side(kind, job, masks) for kind in KINDS]
    for first in range(0, job["steps"], BLOCK):
        block = range(first, min(first + BLOCK, job["steps"]))
        for side in Random(first).sample(sides, len(sides)):  # alike on all ranks
            train(side, block, job, data)
    facts["sides"] = [side.facts(masks) for side in sides]
    sparse_axonn.shutdown()
    leave()
    return facts


def train(side: "Side", block: range, job: dict, data: Data) -> None:
    """One block of steps of one side."""
    sent_before = None
    for step in block:
        if step == block.start + UNTIMED:
            dist.barrier()
            sent_before = transmitted_bytes(job["interface"])
        side.step(step, job, data, timed=step >= block.start + UNTIMED)
        report_progress(side=side.kind)
    dist.barrier()
    sent_after = transmitted_bytes(job["interface"])
    if sent_before is not None and sent_after is not None:
        side.sent.append((sent_after - sent_before) / (len(block) - UNTIMED))


class Side:
    """One training: an engine, an optimizer, and what was measured of them."""

    def __init__(self, kind: str, job: dict, masks: Mapping[str, Tensor]) -> None:
        self.kind = kind
        model, _ = pruned_start(job)
        number, count = ax.config.inter_layer_parallel_rank, ax.config.G_inter
        self.stage = Stage(model, number, count, job["tokens"], job["width"])
        if kind == MASKED:
            mask_gradients(self.stage, masks)
        self.engine = make_engine(kind, self.stage, masks, job)
        groups = sparse_comm.param_groups(self.stage, WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)
        self._watch_optimizer()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.sent: list[float] = []
        self.spans: list[list[axonn_phases.Span]] = []
        self._own: list[axonn_phases.Span] = []  # of the step that is on

    def step(self, number: int, job: dict, data: Data, timed: bool) -> None:
        """One step on batch ``number``, after the ranks have met."""
        tokens, targets = data.batch(number, job["batch"], job["tokens"])
        ax.config.micro_batch_size = job["micro_batch"]
        self.optimizer.zero_grad()
        dist.barrier()
        self._own = []
        ignore = observe_spans(lambda *span: self._own.append(axonn_phases.Span(*span)))
        start = time.perf_counter()
        loss = self.engine.forward_backward_optimizer(tokens, targets, self.optimizer)
        seconds = time.perf_counter() - start
        ignore()
        self.losses.append(loss)
        if timed:
            self.seconds.append(seconds)
            self.spans.append(sorted(self._own, key=lambda span: span.start))
        elif not isinstance(self.engine, ReleasedEngine) and len(self.losses) == UNTIMED:
            self.engine.reset_stats()

    def _watch_optimizer(self) -> None:
        began: list[float] = []

        def before(*_: Any) -> None:
            began.append(time.perf_counter())

        def after(*_: Any) -> None:
            end = time.perf_counter()
            self._own.append(axonn_phases.Span(axonn_phases.STEP, began.pop(), end))

        self.optimizer.register_step_pre_hook(before)
        self.optimizer.register_step_post_hook(after)

    def facts(self, masks: Mapping[str, Tensor]) -> dict:
        state = sparse_comm.dense_state_dict(self.stage)
        left = sum(int(state[n][~m].count_nonzero()) for n, m in masks.items() if n in state)
        stats = {} if isinstance(self.engine, ReleasedEngine) else self.engine.stats()
        payload = stats["bytes_sent"] if stats else self.engine.bytes_sent
        return {
            "kind": self.kind,
            "losses": self.losses,
            "seconds": self.seconds,
            "bytes": self.sent,
            "payload": payload,
            "wire_s": stats.get("wire_s"),
            "exposed_s": stats.get("exposed_s"),
            "pruned_weights_left": left,
            "spans": [[(s.name, s.start, s.end) for s in step] for step in self.spans],
        }


def make_engine(kind: str, stage: nn.Module, masks: Mapping[str, Tensor], job: dict) -> Any:
    options: dict[str, Any] = {"micro_batch_size": job["micro_batch"]}
    engine: Callable[..., Any] = sparse_axonn.InterLayerEngine
    if kind in (RELEASED, RELEASED_BF16):
        engine = ReleasedEngine
        options["travel"] = torch.bfloat16 if kind == RELEASED_BF16 else None
    else:
        options |= {"stats": True, "reduce_dtype": torch.bfloat16}
        options["overlap"] = kind not in (BUCKETS_AFTER, COMPACT_AFTER)
    if kind in COMPACT:
        weights = "transient" if kind == TRANSIENT else "cached"
        options |= {"sparse": True, "masks": masks, "weights": weights}
    else:
        assert kind in (RELEASED, RELEASED_BF16, BUCKETS, BUCKETS_AFTER, MASKED)
    return engine(stage, loss_of, torch.bfloat16, **options)


def mask_gradients(stage: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """From now on pruned entries get no gradient: where weights are zero, AdamW leaves them so."""
    for name, parameter in stage.named_parameters():
        if (mask := masks.get(name)) is not None:
            parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


if __name__ == "__main__":
    rank_main(main)
