"""One rank of ``compare_comm.py --pipeline``: pipelines of one pruned model train in turn."""

import contextlib
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from sparse_comm.integrations.pytorch import pack_sends
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import sparse_comm

from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .netns import transmitted_bytes
from .pair import BLOCK, UNTIMED
from .pipeline_kinds import codec_of
from .pipeline_models import ALL, loss_of, stages
from .pipeline_start import LEARNING_RATE, Data

_SENDS = 7  # repeats of messages alone
_HELD_OUT = 1 << 20  # seed of what training never sees


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Returns what was measured of each side, ready for JSON."""
    job = read_job(arguments)
    torch.set_num_threads(1)
    join(workdir, rank, job["stages"])
    data = Data(job["model"], job["images"])
    sides = [Side(kind, rank, job) for kind in job["kinds"]]
    for first in range(0, job["steps"], BLOCK):
        block = range(first, min(first + BLOCK, job["steps"]))
        for side in Random(first).sample(sides, len(sides)):  # alike on all ranks
            side.train(block, data)
    for side in sides:
        side.count_traffic()
        side.evaluate(data)
        for boundary in filter(None, (side._end("before"), side._end("behind"))):
            boundary.take_traffic()
        side.send_alone(data)
    facts = {"sides": [side.facts() for side in sides]}
    leave()
    return facts


class Stage(PipelineStage):
    """torch's, whose first step does not spoil the statistics of norms; as ``pack_sends`` does."""

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        self._before = [(buffer, buffer.clone()) for buffer in self.submod.buffers()]
        return super()._prepare_forward_infra(*args, **kwargs)

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()
        for buffer, before in self._before:
            buffer.copy_(before)


class Side:
    """One training: a stage, its schedule and optimizer, and what was measured of them."""

    def __init__(self, kind: str, rank: int, job: dict) -> None:
        self.kind, self.rank, self.count, self.job = kind, rank, job["stages"], job
        self.model = ALL[job["model"]]
        start = torch.load(job["start"])
        layers = self.model.layers()
        self.module = stages(self.model, layers, self.count)[rank]
        mine = {name for name, _ in self.module.named_parameters()}
        self.module.load_state_dict(
            {n: t for n, t in start["layers"].items() if n in self.module.state_dict()}
        )
        masks = {name: mask for name, mask in start["masks"].items() if name in mine}
        sparse_comm.compact(self.module, masks)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE, fused=True)
        self.stage = Stage(self.module, rank, self.count, torch.device("cpu"))
        self.schedule = Schedule1F1B(self.stage, job["micro_batches"], loss_fn=loss_of)
        pack_sends(self.stage, codec_of(kind))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.sent: list[float] = []
        self.alone: list[float] = []
        self.traffic = {"forward": (0.0, 0.0), "back": (0.0, 0.0)}
        self.loss, self.accuracy = 0.0, 0.0
        self.nonzero, self.share = 1.0, {"forward": 0.0, "back": 0.0}

    @property
    def is_last(self) -> bool:
        return self.rank == self.count - 1

    @property
    def kept(self) -> float:
        """Fraction of the channels that are sent over the boundary behind this stage."""
        plan = getattr(self.stage, "_sparse_comm", None)
        channels = None if plan is None else plan.ends.channels[1]
        return 1.0 if channels is None else channels.density

    def autocast(self) -> Any:
        if self.job["dtype"] == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def batch(self, seed: int, data: Data, held_out: bool = False) -> tuple[Tensor, Tensor]:
        return data.batch(seed, self.model.batch * self.job["micro_batches"], held_out)

    def train(self, block: range, data: Data) -> None:
        """One block of steps."""
        sent_before = None
        for step in block:
            if step == block.start + UNTIMED:
                dist.barrier()
                sent_before = transmitted_bytes(self.job["interface"])
            seconds = self.step(step, data)
            if step >= block.start + UNTIMED:
                self.seconds.append(seconds)
            report_progress(side=self.kind)
        dist.barrier()
        sent_after = transmitted_bytes(self.job["interface"])
        if sent_before is not None and sent_after is not None:
            self.sent.append((sent_after - sent_before) / (len(block) - UNTIMED))

    def step(self, number: int, data: Data) -> float:
        x, y = self.batch(number, data)
        inputs = (x,) if self.rank == 0 else ()
        losses: list[Tensor] = []
        target: dict[str, Any] = {"target": y, "losses": losses} if self.is_last else {}
        self.optimizer.zero_grad()
        dist.barrier()
        start = time.perf_counter()
        with self.autocast():
            self.schedule.step(*inputs, **target, return_outputs=False)
        self.optimizer.step()
        seconds = time.perf_counter() - start
        if self.is_last:
            self.losses.append(torch.stack(losses).mean().item())
        return seconds

    def count_traffic(self) -> None:
        """Bytes of a step over this rank's boundaries, dense and as they were sent."""
        for which, way in (("behind", "forward"), ("before", "back")):
            if (boundary := self._end(which)) is None:
                continue
            sent, _ = boundary.take_traffic()
            if sent.messages:
                count = self.job["micro_batches"] / sent.messages
                self.traffic[way] = (sent.dense * count, sent.sent * count)

    def evaluate(self, data: Data) -> None:
        """Mean loss and accuracy on data that training never saw."""
        self.module.eval()
        found = []
        for seed in range(self.job["evaluations"]):
            x, y = self.batch(_HELD_OUT + seed, data, held_out=True)
            target: dict[str, Any] = {"target": y} if self.is_last else {}
            with self.autocast():
                out = self.schedule.eval(*((x,) if self.rank == 0 else ()), **target)
            if self.is_last:
                right = (out.flatten(0, -2).argmax(1) == y.flatten()).float().mean()
                found.append((loss_of(out, y).item(), right.item()))
        self.module.train()
        if found:
            self.loss, self.accuracy = (sum(each) / len(found) for each in zip(*found, strict=True))

    def send_alone(self, data: Data) -> None:
        """Seconds of an activation to the next stage and its gradient back, over the last boundary.

        Nothing else is computed or sent meanwhile. With encoding and decoding.
        """
        writer, reader = self.count - 2, self.count - 1
        tensors, shapes = self._boundary_tensors(data)
        gradients = [torch.randn(shape).to(dtype) for shape, dtype in shapes]
        for repeat in range(_SENDS):
            dist.barrier()
            start = time.perf_counter()
            if self.rank == writer:
                self._there_and_back(tensors, shapes, repeat)
            elif self.rank == reader:
                self._back(gradients, repeat)
            if repeat:
                self.alone.append(time.perf_counter() - start)
        dist.barrier()
        if self.rank == writer:
            other = sum(int(tensor.count_nonzero()) * tensor.itemsize for tensor in tensors)
            self.nonzero = other / sum(tensor.nbytes for tensor in tensors)
        for way, end in (("forward", "behind"), ("back", "before")):
            if boundary := self._end(end):
                sent, _ = boundary.take_traffic()
                self.share[way] = sent.sent / sent.dense if sent.messages else 0.0

    def _boundary_tensors(self, data: Data) -> tuple[tuple[Tensor, ...], list[Any]]:
        """What goes over the last boundary, with its graph; its shapes and dtypes on both sides."""
        received: Any = (self.batch(0, data)[0][: self.model.batch],)
        if self.rank > 0:
            received = tuple(
                torch.zeros(info.shape, dtype=info.dtype).requires_grad_(info.requires_grad)
                for info in self.stage._stage_meta.inputs or ()
            )
        with self.autocast():
            out = self.module(*received)
        tensors = out if isinstance(out, tuple) else (out,)
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, [(tuple(t.shape), t.dtype) for t in tensors])
        return tensors, gathered[self.count - 2]

    def _there_and_back(self, tensors: tuple[Tensor, ...], shapes: list[Any], number: int) -> None:
        if behind := self._end("behind"):
            behind.send(list(tensors), number)
            behind.receive(number)
            return
        works = [dist.isend(t.detach().contiguous(), self.rank + 1) for t in tensors]
        for shape, dtype in shapes:
            dist.recv(torch.empty(shape, dtype=dtype), self.rank + 1)
        for work in works:
            assert work is not None
            work.wait()

    def _back(self, gradients: list[Tensor], number: int) -> None:
        if before := self._end("before"):
            before.receive(number)
            before.send(gradients, number)
            before.flush()
            return
        for gradient in gradients:
            dist.recv(torch.empty_like(gradient), self.rank - 1)
        for gradient in gradients:
            dist.send(gradient, self.rank - 1)

    def _end(self, which: str) -> Any:
        plan = getattr(self.stage, "_sparse_comm", None)
        return None if plan is None else getattr(plan.ends, which)  # None with "channels", too

    def facts(self) -> dict:
        return {
            "kind": self.kind,
            "losses": self.losses,
            "seconds": self.seconds,
            "bytes": self.sent,
            "alone": self.alone,
            "traffic": self.traffic,
            "kept": self.kept,
            "nonzero": self.nonzero,
            "share": self.share,
            "loss": self.loss,
            "accuracy": self.accuracy,
        }


if __name__ == "__main__":
    rank_main(main)
