"""torch.distributed.pipelining with sends that carry only what the next stage reads.

The schedules stay torch's: a stage that is packed sends and receives by itself where they ask it
for its sends and receives, which they then find to be none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from sparse_comm.mask_sync import gather, on_all_ranks
from sparse_comm.pipeline import (
    Boundary,
    Codec,
    Description,
    Ends,
    TorchWire,
    boundary_between,
    compare,
    cpu_backend,
    describe,
    has_messages,
)

__all__ = ["pack_sends"]

_TAG = 0x5C0000  # of the first message between two stages; torch's own have 0
_calls: dict[str, int] = {}  # by group: each call has tags of its own


def pack_sends(
    stages: _PipelineStageBase | Sequence[_PipelineStageBase],
    pipeline_codec: str | Codec = "auto",
    *,
    checksum: bool = False,
) -> None:
    """Have pipeline stages send only what the next one reads. A collective of the pipeline's ranks.

    Outputs, gradients and losses stay those of torch's own sends, bit for bit. To be called before
    the schedule's first step, and again after ``update_masks``::

        stage = PipelineStage(module, index, count, device)
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
        pack_sends(stage)

    Args:
        stages: all that this rank has, of torch's ``PipelineStage`` or ``build_stage``. Their
            class becomes a subclass of what it was.
        pipeline_codec: "auto", "channels", "zeros" or "dense" (docs/pipeline.md), or an object
            with the methods of ``sparse_comm.pipeline.Codec``. Channels are those of the masks of
            compact stages.
        checksum: whether messages carry one, at some 0.5 ms a MB.

    Raises:
        ValueError: on all ranks: an unknown codec; stages with different codecs, or not all of
            them; "zeros" where stages are not on CPUs, or the group is not gloo's.
        RuntimeError: on all ranks: other channels than torch has settled the sizes of messages for.

    Source: ours.
    """
    given = list(stages) if isinstance(stages, Sequence) else [stages]
    group = given[0].group or dist.group.WORLD
    assert group is not None

    def mine() -> list[Description]:
        for stage in given:
            has_messages(pipeline_codec, stage.device, cpu_backend(group))
        return [
            describe(stage.stage_index, _module(stage), pipeline_codec, checksum=checksum)
            for stage in given
        ]

    described = on_all_ranks(mine, group)
    everywhere = [one for part in gather(described, group) for one in part]
    planned = compare(everywhere, given[0].num_stages)
    on_all_ranks(lambda: _check_sizes(given, planned, pipeline_codec), group)
    _calls[group.group_name] = call = _calls.get(group.group_name, -1) + 1
    plans = []
    for stage, description in zip(given, described, strict=True):
        if isinstance(stage, PackedStage):
            stage._unpack()
        if pipeline_codec == "dense":
            continue
        object.__setattr__(stage, "__class__", _class(type(stage)))
        assert isinstance(stage, PackedStage)
        tag = _TAG + call * 4 * stage.num_stages
        plans.append(_Plan(stage, description, planned, pipeline_codec, tag))
        stage._sparse_comm = plans[-1]
    for plan in plans:
        plan.of_rank = plans


def _check_sizes(
    stages: Sequence[_PipelineStageBase], planned: Mapping[int, Any], codec: str | Codec
) -> None:
    """Refuse channels whose messages torch would take for others."""
    for stage in stages:
        if has_messages(codec, stage.device, cpu_backend(stage.group)):
            continue
        index = stage.stage_index
        now = (None, None) if codec == "dense" else (planned.get(index - 1), planned.get(index))
        plan = getattr(stage, "_sparse_comm", None)
        before = (None, None) if plan is None else plan.ends.channels
        if stage.args_recv_info and [_kept(c) for c in before] != [_kept(c) for c in now]:
            raise RuntimeError(
                f"stage {index} would send other channels than in its first step, in which torch "
                "has settled the sizes: build stages and schedule anew"
            )
        given = getattr(stage, "_user_meta", None)
        if now != (None, None) and given is not None and (given.inputs or given.outputs):
            raise ValueError(
                f"stage {index} was built with input_args or output_args, of all channels; leave "
                "them out, so that torch sees the sizes that are sent, or use 'dense'"
            )


def _kept(channels: Any) -> list[int] | None:
    return None if channels is None else channels.kept.tolist()


def _module(stage: _PipelineStageBase) -> nn.Module:
    """The stage's module, within DDP or alone."""
    module: nn.Module = stage.submod
    return module.module if isinstance(module, DistributedDataParallel) else module


class _Plan:
    """What a stage was told, until its schedule has said which ranks its neighbours have."""

    def __init__(
        self,
        stage: _PipelineStageBase,
        description: Any,
        planned: Any,
        codec: str | Codec,
        tag: int,
    ) -> None:
        self.stage, self.codec, self.tag, self.checksum = stage, codec, tag, description.checksum
        self._arguments = (_module(stage), description, planned, codec)
        self._ends: Ends | None = None
        self.of_rank: Sequence[_Plan] = [self]

    def end_step(self) -> None:
        """Wait for what this rank has sent, if this is its stage that goes backward last."""
        if self.stage.stage_index == min(plan.stage.stage_index for plan in self.of_rank):
            for plan in self.of_rank:
                plan.ends.end_step()

    @property
    def ends(self) -> Ends:
        """The boundaries of the stage."""
        if self._ends is None:
            index = self.stage.stage_index
            before = behind = None
            if has_messages(self.codec, self.stage.device, cpu_backend(self.stage.group)):
                before, behind = self._boundary(index - 1, index), self._boundary(index + 1, index)
            self._ends = Ends(*self._arguments, before, behind)
        return self._ends

    def _boundary(self, other: int, index: int) -> Boundary | None:
        """This end of the boundary to another stage; None if there is none, or on this rank."""
        stage = self.stage
        if not 0 <= other < stage.num_stages:
            return None
        rank = stage.stage_index_to_group_rank[other]
        if rank == stage.group_rank:
            return None
        group = stage.group or dist.group.WORLD
        assert group is not None
        global_rank = dist.get_global_rank(group, rank)
        first = self.tag + 2 * min(other, index)

        def wire(way: int) -> TorchWire:
            return TorchWire(group, global_rank, first + way)

        return boundary_between(index, other, self.codec, wire, self.checksum)


class PackedStage(_PipelineStageBase):
    """Mixed into the class of a stage."""

    _sparse_comm: _Plan

    def _unpack(self) -> None:
        """Make it torch's own again."""
        plan = self.__dict__.pop("_sparse_comm")
        if plan._ends is not None:
            plan._ends.remove()
        object.__setattr__(self, "__class__", type(self).__mro__[2])

    def clear_runtime_states(self) -> None:
        """As torch's: at the beginning of a step."""
        super().clear_runtime_states()
        self._sparse_comm.ends.begin_step()

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, which runs the stage on memory that nobody has written, to learn shapes.

        A norm that is in training would keep statistics of that.
        """
        if isinstance(self, PipelineStage):  # which cleans up
            self._buffers_before = [(buffer, buffer.clone()) for buffer in self.submod.buffers()]
        return super()._prepare_forward_infra(*args, **kwargs)  # type: ignore[safe-super]

    def _post_metadata_inference_cleanup(self) -> None:
        super()._post_metadata_inference_cleanup()  # type: ignore[misc]  # of PipelineStage
        for buffer, before in self.__dict__.pop("_buffers_before", ()):
            buffer.copy_(before)

    # ---------------------------------------------------------------- what schedules ask for

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; nothing if the messages are ours."""
        if (boundary := self._sparse_comm.ends.before) is None:
            return super().get_fwd_recv_ops(fwd_chunk_id)
        for chunk in (fwd_chunk_id, fwd_chunk_id + 1):  # one ahead
            if chunk < len(self.args_recv_info):
                boundary.expect(chunk)
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; nothing if the messages are ours."""
        if (boundary := self._sparse_comm.ends.behind) is None:
            return super().get_fwd_send_ops(fwd_chunk_id)
        outputs, _ = self.fwd_cache[fwd_chunk_id]
        boundary.send(self._sent(outputs), fwd_chunk_id)
        if not self.has_backward and fwd_chunk_id == len(self.args_recv_info) - 1:
            boundary.flush()  # what was passed through is the caller's again
        return []

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; nothing if the messages are ours."""
        if (boundary := self._sparse_comm.ends.behind) is None or not self.has_backward:
            return super().get_bwd_recv_ops(bwd_chunk_id)
        for chunk in (bwd_chunk_id, bwd_chunk_id + 1):
            if chunk < len(self.grad_recv_info):
                boundary.expect(chunk)
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; nothing if the messages are ours."""
        is_last = self.has_backward and bwd_chunk_id == len(self.args_recv_info) - 1
        if (boundary := self._sparse_comm.ends.before) is None or not self.has_backward:
            if is_last:
                self._sparse_comm.end_step()
            return super().get_bwd_send_ops(bwd_chunk_id)
        gradients = list(self.bwd_cache.pop(bwd_chunk_id))
        for number, info in enumerate(self.args_recv_info[bwd_chunk_id]):
            tensor = info.buffer
            if gradients[number] is None and tensor is not None and tensor.requires_grad:
                gradients[number] = tensor.new_zeros(tensor.shape)  # as torch sends
        boundary.send(gradients, bwd_chunk_id)
        if is_last:
            self._sparse_comm.end_step()
        return []

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> Any:
        if (boundary := self._sparse_comm.ends.before) is not None:
            infos = self.args_recv_info[fwd_chunk_id]
            received = boundary.receive(fwd_chunk_id)
            for info, tensor in zip(infos, received, strict=True):
                info.buffer = tensor
        return super()._retrieve_recv_activations(fwd_chunk_id)

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> Any:
        if (boundary := self._sparse_comm.ends.behind) is not None:
            received = boundary.receive(bwd_chunk_id)
            for info, tensor in zip(self.grad_recv_info[bwd_chunk_id], received, strict=True):
                if info.buffer is not None:
                    info.buffer = tensor
        return super()._retrieve_recv_grads(bwd_chunk_id)

    def _sent(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """What the next stage is to receive, which must be all."""
        for number, output in enumerate(outputs):
            if self.act_send_info[number] != [self.stage_index + 1]:
                raise ValueError(
                    f"output {number} of stage {self.stage_index} goes to stages "
                    f"{self.act_send_info[number]}: pipeline_codec packs what goes to the next "
                    "stage only; use 'dense'"
                )
            if type(output) is not Tensor:
                raise TypeError(
                    f"output {number} of stage {self.stage_index} is a {type(output).__name__}; "
                    "pipeline_codec packs plain tensors: use 'dense'"
                )
        return list(outputs)


_classes: dict[type, type] = {}


def _class(base: type) -> type:
    if issubclass(base, PackedStage):
        return base
    if base not in _classes:
        names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _classes[base] = type(base.__name__, (PackedStage, base), names)
    return _classes[base]
