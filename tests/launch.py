"""Start real processes, one a rank, joined by gloo: what every multi-process test uses.

    from tests.launch import run

    def sum_of_ranks(rank: int, world_size: int) -> float: ...   # at the top of a test module

    assert run(sum_of_ranks, 3) == [3.0, 3.0, 3.0]

The processes are forked from a server that has imported torch already, so that a launch costs
some tenths of a second; the server starts with the first launch and ends with the test session. The
rendezvous store listens in the calling process on a port that the system picks, so no two launches
can race for one. Whatever happens, no process and no temporary file outlives its launch.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["CONTEXT", "Outcome", "RankError", "outcomes", "run", "shared_folder"]

_HOST = "127.0.0.1"
_START = 60  # seconds in which all ranks must have started
_GRACE = 0.5  # seconds in which other ranks may report after one has failed
CONTEXT = multiprocessing.get_context("forkserver")
# What test modules import anyway. None of it starts a thread, which a fork would lose.
CONTEXT.set_forkserver_preload(["torch.distributed", "sparse_comm", "pytest", "hypothesis"])


class RankError(RuntimeError):
    """A rank raised, died, or did not end in time; the message holds its traceback."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        value: what its function returned; None if it did not.
        error: the exception that it raised; a RankError if the process died or hung; None if it
            returned.
        traceback: text of the exception, empty if there is none.
    """

    value: Any = None
    error: BaseException | None = None
    traceback: str = ""


def run(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Any]:
    """What ``function(rank, world_size, *args)`` returns on each rank, in a process a rank.

    In each process the default process group is initialized (gloo), torch uses one thread, and
    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, OMP_NUM_THREADS=1 and TMPDIR (a folder
    of this launch) are set.

    Args:
        function: at the top level of an importable module; arguments and result are pickled.
        world_size: number of processes.
        *args: given to every rank.
        timeout: seconds, from when all ranks have started, until they are killed; also the
            process group's timeout.

    Raises:
        RankError: for the rank that failed first, with its traceback. The others are killed.
    """
    ended = _launch(function, world_size, args, timeout, stop_early=True)
    failed = [(when, rank) for rank, (when, outcome) in ended.items() if outcome.error is not None]
    if failed:
        rank = min(failed)[1]
        outcome = ended[rank][1]
        text = f"rank {rank} of {world_size}:\n{outcome.traceback or outcome.error}"
        raise RankError(text) from outcome.error
    return [ended[rank][1].value for rank in range(world_size)]


def outcomes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120
) -> list[Outcome]:
    """How each rank ended, failures included: for tests of what all ranks do when one fails.

    Like ``run``, but never raises for a rank, and lets the others go on after one has failed. A
    rank that has not ended after ``timeout`` seconds is killed and gets a RankError.
    """
    ended = _launch(function, world_size, args, timeout, stop_early=False)
    return [ended[rank][1] for rank in range(world_size)]


def shared_folder() -> Path:
    """A new folder that all ranks know, until the launch ends. A collective."""
    made = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(made)
    return Path(made[0])


def _launch(
    function: Callable[..., Any],
    world_size: int,
    args: tuple[Any, ...],
    timeout: float,
    stop_early: bool,
) -> dict[int, tuple[float, Outcome]]:
    """When and how each rank ended, by rank."""
    # Plain pickle: multiprocessing's own would put tensors into shared memory.
    work = pickle.dumps((function, args))
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    folder = tempfile.TemporaryDirectory(prefix="sparse_comm-tests-")
    processes: list[BaseProcess] = []
    ranks: dict[Connection, int] = {}  # of those that have not ended
    try:
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            process_args = (theirs, work, rank, world_size, store.port, timeout, folder.name)
            process = CONTEXT.Process(target=_rank_main, args=process_args)
            process.start()
            theirs.close()
            ranks[ours] = rank
            processes.append(process)
        return _collect(ranks, processes, timeout, stop_early)
    finally:
        for started in processes:
            started.kill()
        for started in processes:
            started.join()
        folder.cleanup()


def _collect(
    ranks: dict[Connection, int], processes: list[BaseProcess], timeout: float, stop_early: bool
) -> dict[int, tuple[float, Outcome]]:
    ended: dict[int, tuple[float, Outcome]] = {}
    starting = len(processes)
    limit, limit_after_failure = time.monotonic() + _START, math.inf
    while ranks and (left := min(limit, limit_after_failure) - time.monotonic()) > 0:
        for pipe in wait(list(ranks), timeout=left):
            assert isinstance(pipe, Connection)
            message = _receive(pipe, processes[ranks[pipe]])
            if message is None:  # it has started
                starting -= 1
                limit = limit if starting else time.monotonic() + timeout
                continue
            ended[ranks.pop(pipe)] = message
            if stop_early and message[1].error is not None:
                # The first to be heard of need not be the first that failed.
                limit_after_failure = min(limit_after_failure, time.monotonic() + _GRACE)
    for rank in ranks.values():
        late = "started" if starting else f"ended {timeout} s after the start"
        ended[rank] = (math.inf, Outcome(error=RankError(f"had not {late}, was killed")))
    return ended


def _receive(pipe: Connection, process: BaseProcess) -> tuple[float, Outcome] | None:
    """When and how the rank ended, or None, its sign that it has started."""
    try:
        message: tuple[float, Outcome] | None = pickle.loads(pipe.recv_bytes())
        return message
    except EOFError:
        process.join()
        error = RankError(f"the process died with exit code {process.exitcode}")
        return 0.0, Outcome(error=error)  # what others raised follows from its death


def _rank_main(
    pipe: Connection,
    work: bytes,
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    folder: str,
) -> None:
    _die_with_parent()
    torch.set_num_threads(1)
    tempfile.tempdir = folder
    os.environ.update(
        TMPDIR=folder,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR=_HOST,
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",  # Accelerate sets the threads anew where it is not set
    )
    try:
        function, args = pickle.loads(work)
        limit = timedelta(seconds=_START)
        store = dist.TCPStore(_HOST, port, is_master=False, timeout=limit)
        _meet(store, "imported", world_size)  # which takes some ranks longer than others
        limit = timedelta(seconds=timeout)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=limit
        )
        _meet(store, "connected", world_size)  # or one that fails at once would disturb others
        pipe.send_bytes(pickle.dumps(None))
        value = function(rank, world_size, *args)
        message = pickle.dumps((time.monotonic(), Outcome(value)))
    except BaseException as error:  # an exit or an interrupt is an outcome, too
        text = traceback.format_exc()
        message = pickle.dumps((time.monotonic(), Outcome(None, _picklable(error), text)))
    pipe.send_bytes(message)
    if dist.is_initialized():
        dist.destroy_process_group()


def _meet(store: dist.TCPStore, where: str, world_size: int) -> None:
    """A barrier that needs none of the ranks to live on."""
    if store.add(where, 1) == world_size:
        store.set(f"all {where}", "")
    store.wait([f"all {where}"])


def _picklable(error: BaseException) -> BaseException:
    error.__traceback__ = error.__cause__ = error.__context__ = None
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RankError(f"{type(error).__name__}: {error}")


def _die_with_parent() -> None:
    """End this process at once if the one that launched it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
