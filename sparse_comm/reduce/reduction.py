"""``Reduction``: how gradients are reduced, and what is kept from one step to the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.watch import MARK
from sparse_comm.reduce.stats import Record, Recorder
from sparse_comm.reduce.write import Writer, write

__all__ = ["InnerHook", "Kept", "Reduction"]

InnerHook = tuple[Any, Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]]

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Kept:
    """What is kept of one bucket from step to step: it goes with DDP's own buffer of the bucket.

    Attributes:
        dtype: what the gradients travel in.
        send: buffer of that dtype; None if the gradients travel as they are.
        under_way: whether the bucket is being reduced.
        task: the backward pass that reduced it last.
        bytes_dense: bytes of the gradients that a dense model would have sent; None if unknown.
    """

    __slots__ = ("bytes_dense", "dtype", "send", "task", "under_way")

    def __init__(self, gradients: Tensor, dtype: torch.dtype) -> None:
        self.dtype = dtype
        lossy = dtype != gradients.dtype
        self.send = torch.empty_like(gradients, dtype=dtype) if lossy else None
        self.under_way = False
        self.task = -1
        self.bytes_dense: int | None = None


class Reduction:
    """How gradients are reduced: the state of ``reduce_hook``, or an argument of ``fully_shard``.

    **What is lossy.** A smaller ``dtype`` rounds each rank's gradient and each sum: bfloat16 keeps
    8 significant bits and float32's range; float16 keeps 11, turns magnitudes above 65504 into
    infinity and loses those below 6e-8, so it needs a gradient scaler. NaNs and infinities arrive
    as such. Gradients whose dtype takes no more bytes than ``dtype`` travel as they are (those of
    bf16 values, whether ``dtype`` is bfloat16 or float16), and so do sparse ones; float64 becomes
    ``dtype`` as float32 does.

    One Reduction serves several DDP models, in turn or in one backward. Its buffers, one a bucket
    and as many bytes as ``dtype`` takes, go when DDP drops the bucket.

    Args:
        dtype: what gradients travel in; None for as they are.
        process_group: the ranks; the default group if not given. It must be DDP's own.
        hook: the (state, hook) pair of a DDP communication hook that is to reduce in place of the
            all-reduce here, as DDP takes one hook only. It is given the bucket in ``dtype``, and
            divides by the number of ranks itself, as DDP's hooks do.
        stats: whether to keep figures for ``stats()``; costs nothing if not.

    Raises:
        ValueError: ``dtype`` is not one in which gradients can be summed.
        TypeError: ``hook`` is not a (state, hook) pair.

    Source: ours.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = torch.bfloat16,
        process_group: dist.ProcessGroup | None = None,
        hook: InnerHook | None = None,
        stats: bool = False,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be torch.bfloat16, float16, float32, float64 or None, got {dtype!r}"
            )
        if hook is not None and not (
            isinstance(hook, tuple) and len(hook) == 2 and callable(hook[1])
        ):
            raise TypeError(
                f"hook must be a (state, hook) pair as for register_comm_hook, got {hook!r}"
            )
        self.dtype = dtype
        self.process_group = process_group
        self.hook = hook
        self.recorder = Recorder() if stats else None
        # By the buckets' buffers: DDP makes new ones after its first step, and several models may
        # share this object.
        self._kept = WeakTensorKeyDictionary()
        self._dense_numel = WeakTensorKeyDictionary()  # by compact parameter

    # ---------------------------------------------------------------- figures

    def watch(self, model: nn.Module) -> None:
        """Take note of the dense sizes of a compact model's parameters, for ``bytes_dense``.

        ``distributed_data_parallel`` and ``fully_shard`` call it for you. After
        ``register_comm_hook`` by hand, call it once; without it ``bytes_dense`` is None.
        """
        for _, module, name, slot in compact_slots(model):
            self._dense_numel[module._parameters[name]] = slot.pattern.numel

    def stats(self) -> dict[str, Any]:
        """What the reduction cost since the start or the last ``reset_stats()``, on this rank.

        Medians a step, over at most the last 1000, times in seconds:

        - ``steps``: number of backward passes that reduced; the one figure that is no median.
        - ``bytes_dense``: what the gradients of the dense model would have taken, in their own
          dtype; None if unknown (see ``watch``).
        - ``bytes_sent``, ``collectives``: what was handed to the process group; None if ``hook``
          does the sending, which may compress further. (A ring of N ranks sends 2 (N-1) / N times
          as many bytes a rank.)
        - ``pack_s``: in ``kernels.pack``, in all backward passes since the step before.
        - ``wire_s``: while at least one bucket was under way, from its being handed over until its
          collective completed. None on GPUs, whose collectives outlive the calls.
        - ``exposed_s``: what backward waits for: from the last bucket's being handed over until
          the end of backward, and the time in collectives that block. None on GPUs.
        - ``buckets``: the same of each bucket of the last step, in the order they were handed
          over, as a list of dicts with ``dtype``, ``bytes_dense``, ``bytes_sent``,
          ``collectives`` and ``wire_s``.
        - ``total``: the sums over all steps, as a dict of the keys above from ``bytes_dense`` to
          ``exposed_s``.

        Raises:
            RuntimeError: this Reduction keeps no figures.
        """
        return self._figures().figures()

    def reset_stats(self) -> None:
        """Start the figures anew.

        Raises:
            RuntimeError: this Reduction keeps no figures.
        """
        self._figures().reset()

    def write_stats(self, writer: Writer, step: int) -> None:
        """Give the figures to the monitor that is there already.

        Args:
            writer: a ``logging.Logger`` gets one line; a TensorBoard ``SummaryWriter`` scalars
                named ``sparse_comm/…``; a W&B run, or the module, a dict of such scalars;
                any other callable ``(stats(), step)``.
            step: the training step.

        Raises:
            TypeError: the writer is none of these.
            RuntimeError: this Reduction keeps no figures.
        """
        write(self.stats(), writer, step)

    def _figures(self) -> Recorder:
        if self.recorder is None:
            raise RuntimeError(
                "this Reduction keeps no figures: make it with Reduction(…, stats=True)"
            )
        return self.recorder

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The dtype, and the state of ``hook``: its ``state_dict()`` if it has one, or itself."""
        return {"dtype": self.dtype, "hook_state": _hook_state(self.hook)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the Reduction that ``state`` came from. Keeps process groups and figures.

        Args:
            state: of ``state_dict()``.

        Raises:
            KeyError: it is not.
        """
        self.dtype = state["dtype"]
        saved = state["hook_state"]
        if self.hook is None or saved is None:
            return
        current, function = self.hook
        if hasattr(current, "load_state_dict"):
            current.load_state_dict(saved)
            return
        saved = copy.deepcopy(saved)
        if hasattr(current, "process_group"):
            saved.process_group = current.process_group
        self.hook = (saved, function)

    def __getstate__(self) -> dict[str, Any]:
        """Without process groups, buffers and figures."""
        hook = self.hook
        if hook is not None and isinstance(hook[0], dist.ProcessGroup):
            hook = (None, hook[1])
        return {"dtype": self.dtype, "hook": hook, "stats": self.recorder is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # with the default process group

    # ---------------------------------------------------------------- for hooks

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.process_group)

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of ``dtype`` travel."""
        if self.dtype is None or not dtype.is_floating_point:
            return dtype
        return self.dtype if self.dtype.itemsize < dtype.itemsize else dtype

    def dense_bytes(self, parameters: Sequence[Tensor], itemsize: int) -> int | None:
        """Bytes of these parameters' dense gradients; None if a compact one was not watched."""
        total = 0
        for parameter in parameters:
            numel = self._dense_numel.get(parameter)
            if numel is None:
                if hasattr(parameter, MARK):
                    return None
                numel = parameter.numel()
            total += numel
        return total * itemsize

    def _is_alone(self, gradients: Tensor) -> bool:
        """Whether there is nothing to send."""
        return gradients.numel() == 0 or self.world_size == 1

    def _begin(self, gradients: Tensor) -> Kept:
        """What is kept of a bucket, marked as under way."""
        kept = self._kept.get(gradients)
        task = torch._C._current_graph_task_id()  # -1 outside backward, as in ddp.join()
        if kept is not None and (kept.under_way or -1 != task == kept.task):
            raise RuntimeError(
                "this bucket is reduced already: a bucket goes through reduce_hook once a backward "
                "pass. To reduce it by two hooks, one inside the other, pass the inner one: "
                "Reduction(hook=(state, hook))"
            )
        dtype = self._dtype_of_travel(gradients)
        if kept is None or kept.dtype != dtype:
            kept = self._kept[gradients] = Kept(gradients, dtype)
        kept.under_way, kept.task = True, task
        return kept

    def _dtype_of_travel(self, gradients: Tensor) -> torch.dtype:
        stays = self.hook is None and self._is_alone(gradients)
        if stays or gradients.layout != torch.strided:
            return gradients.dtype
        return self.wire_dtype(gradients.dtype)

    def _record(self, bucket: dist.GradBucket, kept: Kept, sent: Tensor | None) -> Record | None:
        """The bucket's entry in the figures, if there are any; ``sent`` is what travels."""
        if self.recorder is None:
            return None
        gradients = bucket.buffer()
        if kept.bytes_dense is None:
            kept.bytes_dense = self.dense_bytes(bucket.parameters(), gradients.itemsize)
        unseen = self.hook is not None
        return self.recorder.handed_over(
            bucket.index(),
            dtype=kept.dtype,
            on_cpu=gradients.device.type == "cpu",
            bytes_dense=kept.bytes_dense,
            bytes_sent=None if unseen else _nbytes(sent),
            collectives=None if unseen else int(sent is not None),
        )


def _nbytes(tensor: Tensor | None) -> int:
    if tensor is None or tensor.layout == torch.strided:
        return 0 if tensor is None else tensor.nbytes
    return tensor._indices().nbytes + tensor._values().nbytes


def _hook_state(hook: InnerHook | None) -> Any:
    if hook is None or isinstance(hook[0], dist.ProcessGroup):
        return None
    return hook[0].state_dict() if hasattr(hook[0], "state_dict") else hook[0]
