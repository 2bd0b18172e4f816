"""Which launcher started this process, and how ranks find each other."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist

from .modules import mpi, no_mpi

__all__ = [
    "Launch",
    "bring_all_down_on_errors",
    "finalize_mpi",
    "launched",
    "start_mpi_for_others",
    "start_process_group",
]

# What launchers of MPI programs tell each process: its rank and the number of all.
_MPI_NAMES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
    ("PMIX_RANK", "SLURM_NTASKS"),  # srun --mpi=pmix
)


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        by: "torchrun", "mpirun" or "nothing".
        rank: this process's number; 0 of 1 if nothing started it. That of the process group, if
            there is one already.
        world_size: number of processes, likewise.
    """

    by: str
    rank: int
    world_size: int


def launched() -> Launch:
    """Found out without communication."""
    by, rank, world_size = _by_environment()
    if dist.is_initialized():
        return Launch(by, dist.get_rank(), dist.get_world_size())
    return Launch(by, rank, world_size)


def _by_environment() -> tuple[str, int, int]:
    env = os.environ
    # torchrun first: it may itself have been started by a launcher of MPI, one a machine.
    of_mpi = [(rank, size) for rank, size in _MPI_NAMES if rank in env and size in env]
    if "TORCHELASTIC_RUN_ID" not in env and of_mpi:
        rank, size = of_mpi[0]
        return "mpirun", int(env[rank]), int(env[size])
    if "RANK" in env and "WORLD_SIZE" in env:
        return "torchrun", int(env["RANK"]), int(env["WORLD_SIZE"])
    return "nothing", 0, 1


def start_process_group(launch: Launch, backend: str) -> None:
    """Initialize torch.distributed's default group, unless it is there."""
    if dist.is_initialized():
        return
    if launch.by == "torchrun":
        dist.init_process_group(backend)
        return
    if launch.by == "nothing":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    address, port = _meeting_point()
    dist.init_process_group(
        backend,
        init_method=f"tcp://{address}:{port}",
        rank=launch.rank,
        world_size=launch.world_size,
    )


def _meeting_point() -> tuple[str, int]:
    """Where ranks under mpirun meet: as the environment says, or where rank 0 finds a free port."""
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if mpi is None:
        raise RuntimeError(
            "the ranks of mpirun cannot meet: set MASTER_ADDR and MASTER_PORT for them, or let MPI "
            f"tell them, but {no_mpi}"
        )
    world = _mpi_world()
    hosts = world.allgather(socket.gethostname())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    port = 0
    if world.Get_rank() == 0:
        with contextlib.closing(socket.socket()) as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
    address = os.environ.get("MASTER_ADDR", address)
    return address, int(os.environ.get("MASTER_PORT", world.bcast(port)))


def _mpi_world() -> Any:
    if not mpi.Is_initialized():
        mpi.Init()
    return mpi.COMM_WORLD


def start_mpi_for_others() -> None:
    """Initialize MPI, if this process may be MPI's, and finish it at the end.

    AxoNN imports mpi4py so that MPI is not; Lightning, which asks it for the number of ranks
    unless torchrun has started them, would be aborted.
    """
    if mpi is None or _by_environment()[0] == "torchrun" or mpi.Is_initialized():
        return
    mpi.Init()
    atexit.register(finalize_mpi, failed=False)


def finalize_mpi(failed: bool) -> None:
    """Finish MPI: Open MPI counts a process that ends without as failed.

    Args:
        failed: whether this process left a step in its middle; others may then wait for it, and it
            would wait for them.
    """
    if not _is_running():
        return
    if failed:
        mpi.COMM_WORLD.Abort(1)
    mpi.Finalize()


def _is_running() -> bool:
    """Whether MPI is there, initialized, and not finished."""
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def bring_all_down_on_errors(launch: Launch) -> None:
    """Let an error that nobody catches end all ranks, after its traceback.

    A rank that fails leaves others waiting for it, and would itself wait at its end for messages
    that never come. Ended at once, it is missed by torchrun, which ends the others; mpirun is told.
    """
    if launch.by not in ("torchrun", "mpirun"):
        return
    before = sys.excepthook

    def end_all(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        try:
            before(kind, error, where)
        except Exception:
            traceback.print_exception(kind, error, where)
        sys.stdout.flush()
        sys.stderr.flush()
        if launch.by == "mpirun" and _is_running():
            mpi.COMM_WORLD.Abort(1)
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = end_all
