"""AxoNN on CPUs: other names in its own modules, while a context lasts.

AxoNN asks torch for CUDA and NCCL by name. Inside its modules, the name ``torch`` stands here for
torch with a few of these questions answered otherwise; torch itself is not touched, nor is what any
other module sees of it. So it is with the few functions of AxoNN that a CPU cannot run. Leaving the
context restores everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import modules

__all__ = ["on_cpu"]


@contextmanager
def on_cpu() -> Iterator[None]:
    """AxoNN runs on CPUs in here: with gloo, without CUDA. ``init`` enters it where it has to.

    All that runs AxoNN's code must be inside: building layers, forward, backward, its own
    collectives.

    Source: ours.
    """
    global _depth
    if _depth == 0:
        for module, names in _names().items():
            _before.extend((module, name, vars(module)[name]) for name in names)
            for name, value in names.items():
                setattr(module, name, value)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            for module, name, old in _before:
                setattr(module, name, old)
            _before.clear()


_depth = 0  # of contexts, which need not be left in the order in which they were entered
_before: list[tuple[Any, str, Any]] = []  # what the names meant


def _names() -> dict[Any, dict[str, Any]]:
    """What each name means, by module."""
    names: dict[Any, dict[str, Any]] = {module: {"torch": _torch} for module in _ON_TORCH}
    names[modules.asym_communication]["gather_batch_sizes"] = _gather_batch_sizes
    names[modules.fully_connected] |= {
        "gather_batch_sizes": _gather_batch_sizes,
        "AsyncLinear": _async_linear(),
    }
    names[modules.overlap_communication]["clear_handles"] = _wait_for_handles
    return names


_ON_TORCH = (
    modules.communication,
    modules.inter_layer,
    modules.asym_communication,
    modules.intra_communication,
    modules.overlap_communication,
    modules.fully_connected,
    modules.embedding,
    modules.conv,
)


class _Like:
    """A module with some of its names meaning something else."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _cpu_instead_of_cuda(function: Any) -> Any:
    """A factory of tensors that makes on the CPU what it was to make on a GPU."""

    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return make


def _autocast(device_type: str, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """Autocast of the CPU; none for fp32, where torch would warn that there is none."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast("cpu" if device_type == "cuda" else device_type, dtype, **kwargs)


def _gloo_instead_of_nccl(function: Any) -> Any:
    def call(*args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        return function(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)

    return call


def _device_count() -> int:
    """Ranks of this machine: AxoNN numbers the ranks of a machine by it."""
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


_torch: Any = _Like(
    torch,
    cuda=_Like(
        torch.cuda,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        current_device=lambda: "cpu",
        device_count=_device_count,
    ),
    distributed=_Like(
        dist,
        new_group=_gloo_instead_of_nccl(dist.new_group),
        init_process_group=_gloo_instead_of_nccl(dist.init_process_group),
    ),
    autocast=_autocast,
    empty=_cpu_instead_of_cuda(torch.empty),
    tensor=_cpu_instead_of_cuda(torch.tensor),
)


@torch.no_grad()
def _gather_batch_sizes(local_batch_size: int, process_group: Any = None) -> Tensor:
    """As AxoNN's, which gathers 0-d tensors: gloo cannot."""
    sizes = torch.empty(dist.get_world_size(process_group), dtype=torch.int64)
    dist.all_gather_into_tensor(sizes, torch.tensor([local_batch_size]), group=process_group)
    return sizes


def _wait_for_handles() -> None:
    """As AxoNN's, which synchronizes CUDA instead of waiting for the collectives themselves."""
    for handle in modules.overlap_communication.handles:
        handle.wait()
    modules.overlap_communication.handles = []


def _async_linear() -> Any:
    """AxoNN's, under the CPU's autocast: it was decorated for that of CUDA as it was imported."""
    cls = modules.fully_connected.AsyncLinear
    forward = torch.amp.custom_fwd(cls.forward.__wrapped__, device_type="cpu")
    backward = torch.amp.custom_bwd(cls.backward.__wrapped__, device_type="cpu")
    names = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(cls.__name__, (cls,), names)
