"""Many multi-process cases in one launch: starting processes costs more than most cases.

CASES: Cases = {}

@case(CASES)
def ranks_agree(rank: int, world_size: int) -> None: ...  # runs on every rank, and asserts

@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_under_ddp(name, world_size):
    passed(__name__, world_size, name)
"""

from __future__ import annotations

import functools
import gc
import importlib
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.launch import RankError, run

Case = Callable[[int, int], None]
Cases = dict[str, Case]

_PATIENCE = timedelta(seconds=30)


def case(cases: Cases) -> Callable[[Case], Case]:
    """Register a function under its name, underscores read as spaces."""

    def register(function: Case) -> Case:
        cases[function.__name__.replace("_", " ")] = function
        return function

    return register


def on_two(function: Case) -> Case:
    """A case that would show nothing more on more ranks; put below ``case``."""

    @functools.wraps(function)
    def run(rank: int, world_size: int) -> None:
        if world_size == 2:
            function(rank, world_size)

    return run


def passed(module: str, world_size: int, name: str) -> None:
    """Fail if the case failed on any rank. The first question about a module runs all its cases."""
    failed = _errors(module, world_size)[name]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


@functools.cache
def _errors(module: str, world_size: int) -> dict[str, list[str]]:
    try:
        # TIMEOUT: seconds for all cases of a module that need more than a launch usually gets
        timeout = getattr(importlib.import_module(module), "TIMEOUT", 120)
        return run(_run_all, world_size, module, timeout=timeout)[0]
    except RankError as error:  # a crash or a hang, of which no case can be told from the others
        return {name: [str(error)] for name in importlib.import_module(module).CASES}


def _run_all(rank: int, world_size: int, module: str) -> dict[str, list[str]]:
    """Traceback of each rank on which a case failed, by case."""
    store = dist.distributed_c10d._get_default_store()
    failed = {}
    cases: Cases = importlib.import_module(module).CASES
    for name, function in cases.items():
        gc.collect()
        gc.freeze()  # ZeRO 3 collects garbage at every start: 0.1 s with all that was imported
        try:
            function(rank, world_size)
            mine = "passed"
        except BaseException:  # pytest.fail's exception, too
            mine = f"{name!r} on rank {rank} of {world_size}:\n{traceback.format_exc()}"
        store.set(f"{name}/{rank}", mine)
        failed[name] = [text for text in _all(store, name, world_size, mine) if text != "passed"]
    return failed


def _all(store: dist.Store, name: str, world_size: int, mine: str) -> Sequence[str]:
    """What each rank says. Not by a collective: a rank that failed alone has left others in one."""
    keys = [f"{name}/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, _PATIENCE)
    except dist.DistStoreError as error:
        raise RuntimeError(f"{mine}, but other ranks of case {name!r} hang") from error
    return [store.get(key).decode() for key in keys]
