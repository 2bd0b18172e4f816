"""``InterLayerEngine``: AxoNN's pipeline engine with compact stages and bucketed gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.slot import Mode
from sparse_comm.mask_sync import on_all_ranks
from sparse_comm.pipeline import Codec
from sparse_comm.reduce import GradientBuckets, Reduction

from .agreement import agreed_count, check_arguments, check_shapes, compare_options, micro_batches
from .averaging import agreed_cap_mb, make_buckets, trained
from .checkpoint import load_checkpoint, save_checkpoint
from .compacting import make_compact
from .layers import refuse_unscattered
from .loss_scale import agree_on_scale, unscale
from .masks import Names, whole_names
from .modules import config, inter_layer, intra_layer, overlap_communication
from .sends import Sends, make_sends
from .span import span
from .start import state
from .tied import TiedStages

__all__ = ["InterLayerEngine"]


class InterLayerEngine(inter_layer.AxoNN_Inter_Layer_Engine):
    """AxoNN's ``AxoNN_Inter_Layer_Engine``, for dense stages and for compact ones.

    Gradients are averaged in buckets, while the backward pass of the last micro-batch goes on, in
    place of one all-reduce a parameter after it. With ``sparse=False`` the arithmetic is AxoNN's.

    Example::

        sparse_axonn.init(G_inter=2, G_data=2)
        engine = sparse_axonn.InterLayerEngine(
            stage, loss_fn, torch.bfloat16, sparse=True, masks=masks, micro_batch_size=4
        )
        optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-3)
        for batch, labels in loader:
            optimizer.zero_grad()
            loss = engine.forward_backward_optimizer(batch, labels, optimizer)

    Args:
        model: this rank's stage, dense. With more than one stage it has AxoNN's methods
            ``get_input_shape()`` and ``get_output_shape()``, with -1 for the micro-batch.
        loss_fn: of (output in fp32, labels) of a micro-batch, a mean; used on the last stage.
        computation_dtype: of autocast and of the messages between stages: torch.float16, which
            brings AxoNN's dynamic loss scale, torch.bfloat16, or torch.float32.
        sparse: whether to make the stage compact, in place.
        masks: if so: bool masks (True = unpruned) of the whole model or of this stage, by name.
        weights: "cached" or "transient", as in ``sparse_comm.compact``.
        optimizer: one that was built on the stage's parameters before, to be carried over.
        names: the name in the whole model of each parameter and buffer of the stage, as a function
            of its name in the stage, or a mapping; not needed where they are the same. Masks,
            ``tied`` and checkpoints go by the names of the whole model. Without it, masks may also
            go by the names of the stages, of which several may then use one name.
        micro_batch_size: samples of a micro-batch; that of AxoNN's ``create_dataloader`` if not
            given.
        tied: (name of a parameter of the first stage, name of one of the last stage): they start
            with the first's values, and their gradients are summed.
        reduce_dtype: what gradients travel in. Not given, it is the computation dtype if sparse,
            and the gradients' own, as in AxoNN, if not. (In float16 those above 65504, loss scale
            included, overflow on the way; AxoNN's are in fp32.)
        bucket_cap_mb: MiB of a bucket; from the link's measured speed if not given.
        overlap: whether gradients are averaged while backward goes on; losses are the same.
        stats: whether ``stats()`` has figures.
        pipeline_codec: of the messages between stages: "auto", "channels", "zeros" or "dense"
            (docs/pipeline.md); results are the same.
        pipeline_checksum: whether they carry one, at some 0.5 ms a MB.

    Raises:
        ValueError, TypeError, RuntimeError: on all ranks, before anything is trained: ``init`` was
            not called; a stage without parameters; stages whose shapes do not fit; masks that fit
            no parameter or that differ between ranks.

    Source: AxoNN (Singh & Bhatele, IPDPS 2022), SAMO (Singh & Bhatele, IPDPS 2023, section III);
    buckets, overlap and values in place of index lists are ours.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Any], Tensor],
        computation_dtype: torch.dtype = torch.float16,
        *,
        sparse: bool = False,
        masks: Mapping[str, Any] | None = None,
        weights: Mode = "cached",
        optimizer: torch.optim.Optimizer | None = None,
        names: Names = None,
        micro_batch_size: int | None = None,
        tied: tuple[str, str] | None = None,
        reduce_dtype: torch.dtype | None = None,
        bucket_cap_mb: float | None = None,
        overlap: bool = True,
        stats: bool = False,
        pipeline_codec: str | Codec = "auto",
        pipeline_checksum: bool = False,
    ) -> None:
        self._state = state()
        on_all_ranks(lambda: check_arguments(model, computation_dtype, sparse, masks))
        compare_options(
            sparse=sparse,
            computation_dtype=computation_dtype,
            micro_batch_size=micro_batch_size,
            tied=tied,
            reduce_dtype=reduce_dtype,
            bucket_cap_mb=bucket_cap_mb,
        )
        super().__init__(model, loss_fn, computation_dtype)
        self.micro_batch_size = micro_batch_size
        self.names = on_all_ranks(lambda: whole_names(model, names))
        check_shapes(model)
        refuse_unscattered(model)
        TiedStages.check(model, self.names, tied)
        if sparse:
            given = TiedStages.with_both_masks(masks, tied)
            make_compact(model, given, self.names, weights, optimizer)
        self.tied = TiedStages(model, self.names, tied, self._state) if tied else None
        if reduce_dtype is None and sparse:
            reduce_dtype = computation_dtype
        self._codec, self._checksum = pipeline_codec, pipeline_checksum
        self._sends = self._make_sends()
        self.overlap = overlap
        self.reduction = Reduction(reduce_dtype, stats=stats)
        if bucket_cap_mb is None:
            bucket_cap_mb = agreed_cap_mb(model, self.reduction)
        self._cap_mb = bucket_cap_mb
        self._trained = trained(model)
        self._buckets = on_all_ranks(self._make_buckets)
        self._count = 0  # micro-batches of this batch
        self._arrived = {"fw": 0, "bw": 0}  # messages of this batch
        self._evaluates = False
        self._reduces_late = False

    def stats(self) -> dict[str, Any]:
        """What averaging gradients cost on this rank, as ``Reduction.stats()``: by the step.

        ``exposed_s`` is the time from the last bucket's being handed over until all are averaged.

        Raises:
            RuntimeError: the engine was made without ``stats=True``.
        """
        if self.reduction.recorder is None:
            raise RuntimeError("this engine keeps no figures: InterLayerEngine(…, stats=True)")
        return self.reduction.stats()

    def pack_sends(self) -> None:
        """Plan the messages between stages, anew after ``update_masks``. A collective."""
        self._sends.ends.remove()
        self._sends = self._make_sends()

    def _make_sends(self) -> Sends:
        dtype = self.computation_dtype
        return make_sends(self.model, self._state, dtype, self._codec, self._checksum)

    def reset_stats(self) -> None:
        """Start the figures anew."""
        self.reduction.reset_stats()

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer, extra: Any = None
    ) -> None:
        """Save the whole model, its masks and the optimizer's state. A collective of all ranks.

        By the names of the whole model, so that it can be resumed on any other grid of ranks:
        each parameter once, of masked ones the values.

        Args:
            path: of a folder, the same for all ranks; what it holds of an earlier checkpoint is
                replaced.
            optimizer: this rank's.
            extra: rank 0's, of what JSON can hold (the step, the seed); ``load_checkpoint`` gives
                it back. Buffers are those of the first replica.

        Raises:
            ValueError: two stages use one name for different parameters: see ``names``; a
                parameter that is split over the ranks of a stage, but not by AxoNN's layers.
            TypeError: ``extra`` is not for JSON. What was saved before is then still there.

        Source: ours; torch.distributed.checkpoint writes the tensors.
        """
        save_checkpoint(self, optimizer, path, extra)

    def load_checkpoint(
        self, path: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Resume from what ``save_checkpoint`` wrote, on whatever grid. A collective of all ranks.

        A checkpoint of dense stages loads into compact ones, which take the unpruned entries, and
        one of compact stages into dense ones.

        Args:
            path: of the folder.
            optimizer: this rank's: its state and options are replaced; None to leave them out.

        Returns:
            ``extra`` of ``save_checkpoint``.

        Raises:
            FileNotFoundError: no such checkpoint, or one that was not written to its end.
            ValueError: it lacks a parameter of this stage, or has other masks. Nothing is loaded
                then, on any rank.
        """
        return load_checkpoint(self, optimizer, path)

    # ---------------------------------------------------------------- a step

    def forward_backward_optimizer(
        self,
        batch: Tensor,
        labels: Any,
        optimizer: torch.optim.Optimizer | None = None,
        eval_mode: bool = False,
        post_bw_hook: Callable[[nn.Module], Any] | None = None,
    ) -> float:
        """A step of the optimizer on a batch, or, with ``eval_mode``, the loss and nothing else.

        Args:
            batch: inputs of this replica; the first stage reads them, and all look at their number.
            labels: read by the last stage.
            optimizer: on the stage's parameters; not needed with ``eval_mode``.
            eval_mode: whether to evaluate.
            post_bw_hook: called with the stage when its gradients are complete, but not averaged
                yet; they are then averaged after it, without overlap.

        Returns:
            The mean loss of the micro-batches on the last stage, 0 on the others.

        Raises:
            ValueError: on all ranks: the micro-batch size is unknown, or does not divide the
                batch of some rank; stages of a pipeline with different numbers of micro-batches.
            RuntimeError: an earlier step has failed, so that messages of it may be under way.
        """
        if self.micro_batch_size is not None:
            config.micro_batch_size = self.micro_batch_size

        def count() -> int:
            if optimizer is None and not eval_mode:
                raise TypeError("training needs the optimizer; without one, give eval_mode=True")
            return micro_batches(batch, labels)

        self._count = agreed_count(count, eval_mode)
        if (now := trained(self.model)) != self._trained:  # some were frozen, or no longer are
            self._trained = now
            self._buckets = self._make_buckets()
        self._arrived = {"fw": 0, "bw": 0}
        self._evaluates = eval_mode
        self._reduces_late = post_bw_hook is not None
        # AxoNN's own overlap gives weights their gradients after backward has passed them.
        self._buckets.overlap = self.overlap and not overlap_communication.OVERLAP_REDUCE_SCATTER

        def finish(model: nn.Module) -> None:
            if post_bw_hook is not None:
                post_bw_hook(model)
                self._buckets.reduce()
            self._average()

        self._sends.begin()
        self._state.stepping = True
        with intra_layer.no_grad_sync():  # which AxoNN would do here
            loss: float = super().forward_backward_optimizer(
                batch,
                labels,
                _Nothing() if eval_mode else optimizer,
                eval_mode,
                None if eval_mode else finish,
            )
        self._state.stepping = False
        return loss

    def _make_buckets(self) -> GradientBuckets:
        return make_buckets(self.model, self.names, self.reduction, self._cap_mb)

    def _average(self) -> None:
        with span("collective"):
            self._buckets.wait()
            if self.tied is not None:
                self.tied.sum_gradients(self.reduction)

    # ---------------------------------------------------------------- AxoNN's parts of a step

    def _forward_pass(self, input_activation: Tensor, microbatch_no: int, eval_mode: bool) -> None:
        with span("forward"):
            super()._forward_pass(input_activation, microbatch_no, eval_mode)

    def _calc_loss(self, *args: Any, **kwargs: Any) -> Any:
        with span("loss"):
            return super()._calc_loss(*args, **kwargs)

    def _backward_pass(self, output_gradients: Tensor | None, microbatch_no: int) -> None:
        last = microbatch_no == self._count - 1 and not self._reduces_late
        with span("backward"), self._buckets.backward(last):
            super()._backward_pass(output_gradients, microbatch_no)
            if overlap_communication.pending_grad_accumulations:
                # inside optimize_communication(), which would add these only when it is left
                overlap_communication.clear_handles()
                overlap_communication.accumulate()

    def _send(self, tensor: Tensor, destination: int, tag: int) -> None:
        if 0 <= destination < config.G_inter:
            with span("send"):
                self._sends.send(tensor, destination, self._evaluates)

    def _clear_transit_tensors(self, clear_all: bool = False) -> None:
        if clear_all:
            with span("send"):  # the last messages leave
                self._sends.flush()

    def _post_recv_requests(self, post_fw_recv: bool = True, post_bw_recv: bool = True) -> None:
        # AxoNN asks for nothing where one message only is to come.
        super()._post_recv_requests(True, not self._evaluates)

    def _post_fw_recv_requests(self) -> None:
        if self.requests["fw"] is None:
            self.requests["fw"] = self._sends.post("fw")

    def _post_bw_recv_requests(self) -> None:
        if self.requests["bw"] is None:
            self.requests["bw"] = self._sends.post("bw")

    def _recv(
        self, post_fw_recv: bool = True, post_bw_recv: bool = True, eval_mode: bool = False
    ) -> tuple[int, Any]:
        """Wait for the next message of either kind, and do the pass that it allows."""
        kinds = [kind for kind in ("fw", "bw") if self.requests[kind] is not None]
        if len(kinds) == 2 and config.G_intra > 1:
            kinds = [self._next_by_schedule()]
        with span("wait"):
            kind = kinds[self._sends.first([self.requests[kind] for kind in kinds])]
            tensor = self.requests[kind].take()
        self.requests[kind] = None
        number = self._arrived[kind]
        self._arrived[kind] += 1
        if kind == "fw":
            if post_fw_recv:
                self._post_fw_recv_requests()
            self._forward_pass(tensor.requires_grad_(), number, eval_mode)
            return number, inter_layer.Operation.FW
        if post_bw_recv:
            self._post_bw_recv_requests()
        self._backward_pass(tensor, number)
        return number, inter_layer.Operation.BW

    def _next_by_schedule(self) -> str:
        """Which of two messages to wait for, where ranks that share a layer must choose alike.

        AxoNN takes what comes first, which may differ between them. This is the order of 1F1B
        (Narayanan et al., 2021), in which the first stage injects micro-batches, too.
        """
        forward, backward = self._arrived["fw"], self._arrived["bw"]
        most = config.G_inter - config.inter_layer_parallel_rank  # under way from this stage on
        return "fw" if forward < self._count and forward - backward < most else "bw"

    # ---------------------------------------------------------------- fp16

    def _unscale_gradients(self) -> bool:
        if self._evaluates:
            return False
        overflow = unscale(self.model, self.scaler.loss_scale, self._state.device)
        return agree_on_scale(self.scaler, overflow, self._state.device)


class _Nothing:
    """In the optimizer's place where there is nothing to step."""

    def step(self) -> None:
        pass
