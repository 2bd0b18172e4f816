"""The launcher reports how every rank ended and leaves no process behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.launch import RankError, outcomes, run


def reduce_ranks(rank: int, world_size: int, tensor: torch.Tensor) -> tuple:
    tensor += rank
    dist.all_reduce(tensor)
    return tensor, os.environ["RANK"], dist.get_world_size(), torch.get_num_threads()


def test_each_rank_gets_its_arguments_and_returns_its_result():
    results = run(reduce_ranks, 3, torch.zeros(2))
    for rank, (tensor, env_rank, world_size, threads) in enumerate(results):
        assert tensor.tolist() == [3, 3] and (env_rank, world_size, threads) == (str(rank), 3, 1)


def fail_on_rank_1(rank: int, world_size: int, how: str) -> None:
    if rank == 1:
        if how == "raise":
            raise KeyError("what rank 1 says")
        if how == "exit":
            raise SystemExit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("raise", "what rank 1 says"),
        ("exit", "SystemExit: 3"),
        ("kill", "the process died with exit code -9"),
    ],
)
def test_run_raises_for_a_failing_rank_and_stops_the_others(how, text):
    with pytest.raises(RankError, match="rank 1 of 3:") as caught:
        run(fail_on_rank_1, 3, how)
    assert text in str(caught.value)
    assert multiprocessing.active_children() == []


def return_raise_or_hang(rank: int, world_size: int) -> str:
    if rank == 1:
        raise ValueError("on purpose")
    if rank == 2:
        time.sleep(600)
    return "done"


def test_outcomes_tell_value_error_and_hang_apart():
    returned, raised, hung = outcomes(return_raise_or_hang, 3, timeout=3)
    assert returned.value == "done" and returned.error is None
    assert isinstance(raised.error, ValueError) and "return_raise_or_hang" in raised.traceback
    assert isinstance(hung.error, RankError) and "had not ended 3 s after the start" in str(
        hung.error
    )
    assert multiprocessing.active_children() == []


def big_result(rank: int, world_size: int) -> bytes:
    return bytes(5_000_000)


def test_results_larger_than_a_pipe_arrive():
    assert run(big_result, 2) == [bytes(5_000_000)] * 2
