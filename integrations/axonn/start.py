"""``init``: AxoNN's, on CPUs as on GPUs, by mpirun as by torchrun."""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch
import torch.distributed as dist

from sparse_comm.cli.versions import BOUNDS, within

from .cpu import on_cpu
from .launcher import (
    Launch,
    bring_all_down_on_errors,
    finalize_mpi,
    launched,
    start_process_group,
)
from .mended import mended
from .modules import ax, communication, mpi, no_mpi
from .transport import MPITransport, TorchTransport, Transport

__all__ = ["State", "init", "shutdown", "state"]

_AXES = ("data", "inter", "depth", "row", "column")  # of AxoNN's ranks, the last varies fastest
_PARTS = ("data", "depth")  # along which ranks have different parts of the batch


@dataclass
class State:
    """What ``init`` has set up.

    Attributes:
        device: "cpu" or "cuda".
        transport: of messages between stages; None if there is one stage only.
        groups: of the ranks that differ from this one along the axes of the key only.
        pipeline: the ranks that hold the stages of one replica, in their order.
        stepping: whether a step is on, or has failed: its messages may be under way.
    """

    device: str
    transport: Transport | None
    groups: dict[frozenset[str], dist.ProcessGroup]
    pipeline: dist.ProcessGroup
    stack: ExitStack
    stepping: bool = False


_state: State | None = None


def state() -> State:
    """Of this process.

    Raises:
        RuntimeError: ``init`` was not called.
    """
    if _state is None:
        raise RuntimeError(
            "call sparse_comm.integrations.axonn.init(G_inter=…, G_data=…) first; it takes the "
            "arguments of AxoNN's own init, and calls it"
        )
    return _state


def init(
    G_inter: int = 1,
    G_data: int = 1,
    G_intra_r: int = 1,
    G_intra_c: int = 1,
    G_intra_d: int = 1,
    gpus_per_node: int | None = None,
    *,
    device: str = "auto",
    transport: str = "auto",
) -> None:
    """AxoNN's ``init``, on CPUs too, under torchrun as under mpirun. A collective of all ranks.

    On CPUs AxoNN stays in ``on_cpu()`` from here to ``shutdown()``, and in both cases with its
    defects mended (docs/axonn-defects.md lists them).

    Args:
        G_inter: number of pipeline stages.
        G_data: number of replicas that each take a part of the batch.
        G_intra_r: ranks by which AxoNN's layers split the rows of a weight.
        G_intra_c: ranks by which they split its columns.
        G_intra_d: ranks by which they split what is left, and the batch.
        gpus_per_node: GPUs of a machine, if not all that torch sees.
        device: "cuda", "cpu", or "auto": CUDA where there is a GPU.
        transport: of messages between stages: "mpi", "torch" (torch.distributed; CPUs only), or
            "auto": MPI under mpirun and on GPUs, else torch.distributed.

    Raises:
        ValueError: the sizes do not multiply to the number of processes; an unknown device or
            transport.
        RuntimeError: an untested AxoNN; no launcher for more than one rank; no MPI where it is
            needed. All of these on every rank, before anything is sent.

    Source: ours; AxoNN is Singh & Bhatele, IPDPS 2022, its grid of ranks Singh et al., 2023
    (arXiv 2305.13525).
    """
    global _state
    sizes = {"data": G_data, "inter": G_inter, "depth": G_intra_d}
    sizes |= {"row": G_intra_r, "column": G_intra_c}
    launch = launched()
    _check(launch, sizes)
    device = _device(device)
    transport = _transport(transport, launch, device, G_inter)
    if _state is not None:
        shutdown()
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(on_cpu())
        stack.enter_context(mended())
        start_process_group(launch, "gloo" if device == "cpu" else "nccl")
        with _mpi_for_pipelines(transport == "mpi"):
            ax.init(G_inter, G_data, G_intra_r, G_intra_c, G_intra_d, gpus_per_node)
        backend = "gloo" if device == "cpu" else "nccl"
        pipeline = _group(sizes, frozenset(("inter",)), backend)
        groups = _groups_to_average(sizes, backend)
        carrier: Transport | None = None
        if G_inter > 1:
            carrier = MPITransport() if transport == "mpi" else TorchTransport(pipeline)
        _state = State(device, carrier, groups, pipeline, stack.pop_all())
    _at_exit(launch)


def shutdown() -> None:
    """Undo ``init``: AxoNN's modules are as they were. Process groups stay; a local call."""
    global _state
    if _state is not None:
        _state.stack.close()
        _state = None
        ax.is_initialized = False


def _check(launch: Launch, sizes: dict[str, int]) -> None:
    version, bounds = metadata.version("axonn"), BOUNDS["axonn"]
    if not within(version, bounds):
        raise RuntimeError(
            f"AxoNN {version} is outside the range that sparse_comm is tested with: "
            f'pip install "axonn{bounds}"'
        )
    wanted = math.prod(sizes.values())
    if min(sizes.values()) < 1:
        raise ValueError(f"sizes of AxoNN's grid must be at least 1, got {_product(sizes)}")
    there = dist.is_initialized()
    if launch.by == "nothing" and wanted > 1 and not there:
        raise RuntimeError(
            f"{_product(sizes)} need {wanted} processes, and no launcher has started any: "
            f"torchrun --nproc-per-node {wanted} SCRIPT, or mpirun -n {wanted} python SCRIPT"
        )
    if launch.world_size != wanted:
        raise ValueError(
            f"{_product(sizes)} need {wanted} processes, and "
            f"{'the process group has' if there else f'{launch.by} has started'} "
            f"{launch.world_size}: change the sizes, or the number of processes"
        )


def _product(sizes: dict[str, int]) -> str:
    return (
        f"G_inter {sizes['inter']} × G_data {sizes['data']} × G_intra_r {sizes['row']} × "
        f"G_intra_c {sizes['column']} × G_intra_d {sizes['depth']}"
    )


def _device(device: str) -> str:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise RuntimeError("device is 'cuda', but torch sees no GPU: use 'cpu', or 'auto'")
    return "cuda" if device == "auto" and there else device.replace("auto", "cpu")


def _transport(transport: str, launch: Launch, device: str, stages: int) -> str:
    if transport not in ("auto", "mpi", "torch"):
        raise ValueError(f"transport must be 'auto', 'mpi' or 'torch', got {transport!r}")
    if stages == 1:
        return "none"
    if transport == "auto":
        transport = "mpi" if device == "cuda" or (launch.by == "mpirun" and mpi) else "torch"
    if transport == "torch" and device == "cuda":
        raise ValueError(
            "transport='torch' sends between CPUs only; on GPUs AxoNN's pipelines need an MPI that "
            "reads GPU memory: transport='mpi', launched by mpirun"
        )
    if transport == "mpi" and mpi is None:
        raise RuntimeError(f"G_inter is {stages} and the transport MPI, but {no_mpi}")
    if transport == "mpi" and launch.by == "torchrun":
        raise RuntimeError(
            "torchrun starts processes of which MPI knows nothing: launch by mpirun"
            + (", or use transport='torch'" if device == "cpu" else ", or use device='cpu'")
        )
    return transport


@contextlib.contextmanager
def _mpi_for_pipelines(wanted: bool):  # type: ignore[no-untyped-def]
    """Whether AxoNN, in here, makes MPI's communicators for a pipeline."""
    if wanted:
        yield
        return
    before = communication.MPI4PY
    communication.MPI4PY = False
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # "you will have to use an external …"
            yield
    finally:
        communication.MPI4PY = before


def _groups_to_average(
    sizes: dict[str, int], backend: str
) -> dict[frozenset[str], dist.ProcessGroup]:
    """By the axes over which gradients are averaged (see layers.py); one object for the same ranks.

    A collective.
    """
    long = frozenset(name for name, size in sizes.items() if size > 1)
    made: dict[frozenset[str], dist.ProcessGroup] = {}
    groups = {}
    for axes in (
        ("data",),
        _PARTS,
        (*_PARTS, "column"),
        (*_PARTS, "row"),
        (*_PARTS, "row", "column"),
    ):
        key = frozenset(axes) & long
        if key not in made:
            made[key] = _group(sizes, key, backend)
        groups[frozenset(axes)] = made[key]
    return groups


def _group(sizes: dict[str, int], axes: frozenset[str], backend: str) -> dist.ProcessGroup:
    """The group of the ranks that differ from this one in these axes only. A collective."""
    grid = np.arange(math.prod(sizes.values())).reshape([sizes[name] for name in _AXES])
    varying = [n for n, name in enumerate(_AXES) if name in axes]
    lists = np.moveaxis(grid, varying, range(len(_AXES) - len(varying), len(_AXES)))
    count = math.prod(sizes[name] for name in axes)
    ranks = lists.reshape(-1, count).tolist()
    mine, _ = dist.new_subgroups_by_enumeration(ranks, backend=backend)
    assert mine is not None
    return mine


_ending = False


def _let_gloo_end() -> None:
    """Give gloo's threads the time to drop the last collectives.

    One that does so while Python ends aborts the process: one run in eight of a program that ends
    right after it has saved a checkpoint ("When Python ends" in docs/pytorch.md).
    """
    if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() == "gloo":
        time.sleep(0.2)


def _at_exit(launch: Launch) -> None:
    """Set up, once, how this process ends."""
    global _ending
    if _ending:
        return
    _ending = True
    atexit.register(_let_gloo_end)
    atexit.register(lambda: finalize_mpi(failed=_state is not None and _state.stepping))
    bring_all_down_on_errors(launch)
