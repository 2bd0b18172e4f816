"""What a compact module knows of one compact parameter, and how its dense weight comes about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sparse_comm.compact.watch import MARK, REPLACED, watch_optimizers
from sparse_comm.kernels import ops
from sparse_comm.pattern import SparsityPattern

__all__ = ["MARK", "MODES", "Mode", "Slot", "is_sharded", "mark"]

Mode = Literal["cached", "transient"]
MODES: tuple[Mode, ...] = ("cached", "transient")


class Slot:
    """Pattern and storage of one compact parameter; modules that tie the parameter share it.

    Args:
        name: name of the parameter in the model, for messages.
        pattern: its unpruned entries.
        mode: "cached" keeps one dense copy up to date; "transient" expands at each use.
        compute_dtype: dtype of the dense weight; None for that of the values.
        memory_format: of the dense weight.
    """

    def __init__(
        self,
        name: str,
        pattern: SparsityPattern,
        mode: Mode,
        compute_dtype: torch.dtype | None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.name = name
        self.pattern = pattern
        self.mode = mode
        self.compute_dtype = compute_dtype
        self.memory_format = memory_format
        self.caches = mode == "cached"
        self.cache: Tensor | None = None
        self.stamp = _new_stamp()
        # Where the parameter is a part of one that ranks share: the whole one's shape, and what
        # cuts the part from it. State dicts may then have the whole.
        self.whole: tuple[torch.Size, Callable[[Tensor], Tensor]] | None = None

    def place(self, values: Tensor) -> None:
        """Follow ``values`` to their device and dtype; the next use expands anew."""
        self.pattern = self.pattern.to(values.device)
        if self.caches and not is_sharded(values):
            dtype = self.compute_dtype or values.dtype
            cache = self.cache
            if (
                cache is None
                or (cache.device, cache.dtype) != (values.device, dtype)
                or not cache.is_contiguous(memory_format=self.memory_format)
            ):
                # not under inference_mode: an inference tensor could not be saved for backward
                with torch.inference_mode(False):
                    self.cache = torch.empty(
                        self.pattern.shape,
                        dtype=dtype,
                        device=values.device,
                        memory_format=self.memory_format,
                    )
        mark(values, self)
        self.mark_stale()

    def drop_cache(self, warn: bool = True) -> None:
        """Expand at each use from now on.

        For sharded values: a framework gathers them into the same memory under the same version,
        so nothing tells whether a cache is stale, and it would be a whole copy on every rank.
        """
        if self.cache is not None and warn:
            warnings.warn(
                "weights='cached' keeps no cache of sharded values: their dense weights live from "
                "forward to backward on every rank, unsharded; compact(model, masks, "
                "weights='transient') keeps none",
                stacklevel=2,
            )
        self.caches = False
        self.cache = None

    def mark_stale(self) -> None:
        """Expand at the next use whatever the version of the values says."""
        self.stamp.fill_(-1)

    def expand(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A new dense tensor from ``values``, differentiable; of their dtype if none is given."""
        pattern = self.pattern
        function = ops.Expand.apply if _functorch_active() else ops.expand
        dense = function(values, pattern.bitmap, pattern.offsets, pattern.shape, dtype)
        return dense.contiguous(memory_format=self.memory_format)

    def pack(self, dense: Tensor) -> Tensor:
        """The unpruned entries of ``dense``, differentiable."""
        pattern = self.pattern
        function = ops.Pack.apply if _functorch_active() else ops.pack
        return function(dense, pattern.bitmap, pattern.offsets, pattern.nnz, None)

    def weight(self, values: Tensor) -> Tensor:
        """The dense weight for a forward pass, with ``values`` in its autograd graph."""
        if self.cache is not None and _is_own(values):
            return self._cached(values)
        if self.pattern.device != values.device and not values.is_meta:
            self.pattern = self.pattern.to(values.device)
        if torch.is_grad_enabled() and _is_compiling_for_training():
            # The tag that checkpoint leaves makes the compiler expand again in backward, where
            # it would otherwise keep the dense weight.
            return checkpoint(self.expand, values, self.compute_dtype, use_reentrant=False)
        return self.expand(values, self.compute_dtype)

    def _cached(self, values: Tensor) -> Tensor:
        cache, pattern = self.cache, self.pattern
        assert cache is not None
        if torch.compiler.is_compiling():
            ops.refresh(cache, values, pattern.bitmap, pattern.offsets, self.stamp)
        else:
            dtype = self.compute_dtype or values.dtype
            if cache.device != values.device or cache.dtype != dtype:
                self.place(values)
                cache, pattern = self.cache, self.pattern
                assert cache is not None
            if not values.is_meta:
                ops.refresh_now(cache, values, pattern.bitmap, pattern.offsets, self.stamp)
        if torch.is_grad_enabled() and values.requires_grad:
            return _Cached.apply(values, cache, pattern)
        return cache.detach()

    def nbytes(self) -> dict[str, int]:
        """Bytes of pattern and cache."""
        cache = self.cache.nbytes if self.cache is not None else 0
        return {"pattern": self.pattern.nbytes, "cache": cache}

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        twin = self.__class__.__new__(self.__class__)
        twin.__setstate__(self.__getstate__())
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the dense cache: its dtype and device alone, so that it is made anew."""
        state = dict(self.__dict__)
        cache = state.pop("cache")
        state.pop("stamp")
        state["cache_like"] = None if cache is None else (cache.dtype, str(cache.device))
        # torch.memory_format does not pickle with the protocol that torch.save uses
        state["memory_format"] = str(self.memory_format).removeprefix("torch.")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        like = state.pop("cache_like")
        state["memory_format"] = getattr(torch, state["memory_format"])
        self.__dict__.update(state)
        self.stamp = _new_stamp()
        self.cache = None
        if like is not None:
            self.cache = torch.empty(
                self.pattern.shape,
                dtype=like[0],
                device=like[1],
                memory_format=self.memory_format,
            )


_ORDINARY = (type(None), Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether ``tensor`` is a DTensor, as FSDP2 and tensor parallelism put in a parameter's place.

    Ordinary tensors are told without importing DTensor, which takes half a second.
    """
    if type(tensor) in _ORDINARY or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _new_stamp() -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be written to elsewhere
        return torch.full((2,), -1, dtype=torch.int64, device="cpu")


def mark(values: Tensor, slot: Slot) -> None:
    """Note on the values the name of their parameter and its number of dimensions."""
    watch_optimizers()
    values.__dict__.pop(REPLACED, None)
    setattr(values, MARK, (slot.name, len(slot.pattern.shape)))


class _Cached(torch.autograd.Function):
    """Hands out the cache as the values' dense weight and packs its gradient.

    An operator may not return an alias of its input; an autograd function may, and traces.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, cache: Tensor, pattern: SparsityPattern) -> Tensor:
        ctx.pattern, ctx.nnz, ctx.dtype = pattern, values.shape[0], values.dtype
        return cache.detach()  # not a view in autograd's eyes: writes are the DenseView's business

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        pattern = ctx.pattern
        return (
            ops.pack(grad, pattern.bitmap, pattern.offsets, ctx.nnz, ctx.dtype),
            None,
            None,
        )


def _is_own(values: Tensor) -> bool:
    """Whether these are the module's parameter rather than a tensor put in its place.

    ``functional_call`` substitutes tensors, exporters and fake modes trace: none may touch the
    cache.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or _functorch_active():
        return False
    return isinstance(values, torch.nn.Parameter) and not isinstance(
        values, torch._subclasses.FakeTensor
    )


def _is_compiling_for_training() -> bool:
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def _functorch_active() -> bool:
    """Or forward-mode differentiation: a registered operator would drop the tangent in silence."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
