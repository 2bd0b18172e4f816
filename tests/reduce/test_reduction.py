"""A Reduction says what it takes, pickles, and goes into checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from sparse_comm.reduce import Reduction, reduce_hook
from tests.compact.models import mlp
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import backward, compact_mlp, same, same_on_all_ranks, wrapped

CASES: Cases = {}


class Feedback:
    """State of a user's hook, with a ``state_dict()`` of its own."""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        return {"error": self.error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.error = state["error"]


def hook(state: Any, bucket: Any) -> Any:
    return default_hooks.allreduce_hook(None, bucket)


hook.__annotations__.clear()  # DDP refuses annotations that are strings


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bf16", 16])
def test_a_dtype_that_cannot_be_summed_is_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16, float16"):
        Reduction(dtype)


def test_gradients_travel_in_the_dtype_only_if_it_is_smaller():
    half, single = Reduction(torch.float16), Reduction(torch.float32)
    assert half.wire_dtype(torch.float64) == half.wire_dtype(torch.float32) == torch.float16
    assert half.wire_dtype(torch.bfloat16) == torch.bfloat16
    assert single.wire_dtype(torch.float64) == torch.float32
    assert single.wire_dtype(torch.bfloat16) == torch.bfloat16
    assert half.wire_dtype(torch.complex64) == torch.complex64
    assert Reduction(None).wire_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_are_equal_without_buffers(copied):
    reduction = Reduction(torch.float16, hook=(Feedback(0.5), hook), stats=True)
    twin = copied(reduction)
    assert twin.dtype == torch.float16
    assert twin.hook[1] is hook
    assert twin.hook[0].error == 0.5
    assert twin.hook[0] is not reduction.hook[0]
    assert twin.stats()["steps"] == 0
    assert copied(Reduction()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="keeps no figures"):
        copied(Reduction()).stats()


def test_the_state_holds_the_dtype_and_the_hooks_state():
    reduction = Reduction(torch.float16, hook=(Feedback(0.5), hook))
    state = reduction.state_dict()
    assert state == {"dtype": torch.float16, "hook_state": {"error": 0.5}}
    other = Reduction(hook=(Feedback(), hook))
    feedback = other.hook[0]
    other.load_state_dict(state)
    assert other.dtype == torch.float16
    assert other.hook[0] is feedback
    assert feedback.error == 0.5


def test_a_hooks_state_without_a_state_dict_is_saved_whole_and_not_shared():
    saved = Reduction(hook=({"error": [1.0]}, hook))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    other = Reduction(hook=({"error": [0.0]}, hook))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.hook == ({"error": [1.0]}, hook)
    twin = Reduction(hook=({}, hook))
    twin.load_state_dict(saved.state_dict())
    twin.hook[0]["error"].append(2.0)
    assert saved.hook[0] == {"error": [1.0]}


def test_a_state_loads_where_there_is_no_hook():
    state = Reduction(torch.float16, hook=(Feedback(), hook)).state_dict()
    reduction = Reduction()
    reduction.load_state_dict(state)
    assert (reduction.dtype, reduction.hook) == (torch.float16, None)
    with_hook = Reduction(hook=(Feedback(1.0), hook))
    with_hook.load_state_dict(Reduction(None).state_dict())
    assert with_hook.dtype is None
    assert with_hook.hook[0].error == 1.0
    with pytest.raises(KeyError):
        reduction.load_state_dict({})


@case(CASES)
def process_groups_stay_behind(rank: int, world_size: int) -> None:
    group = dist.new_group([0, 1])
    if rank < 2:
        for reduction in (
            Reduction(process_group=group, stats=True),
            Reduction(process_group=group, hook=(group, default_hooks.allreduce_hook)),
        ):
            ddp = wrapped(compact_mlp(), reduction, process_group=group)
            backward(ddp, rank)  # buffers and futures stay behind, too
            twin = pickle.loads(pickle.dumps(reduction))
            assert twin.process_group is None
            assert twin.hook is None or twin.hook == (None, default_hooks.allreduce_hook)
            assert len(twin._kept) == 0
            state = reduction.state_dict()
            assert state == {"dtype": torch.bfloat16, "hook_state": None}
            reduction.load_state_dict(state)
            assert reduction.process_group is group
    dist.barrier()


@case(CASES)
def a_pickled_model_takes_the_pickled_reduction(rank: int, world_size: int) -> None:
    """DDP pickles its hooks, but does not register them again: whoever loads it does."""
    ddp = wrapped(mlp(), Reduction())
    backward(ddp, rank)
    again = pickle.loads(pickle.dumps(ddp))
    ((function, reduction),) = again._comm_hooks
    assert function is reduce_hook
    again.register_comm_hook(reduction, reduce_hook)
    for step in range(3):
        reduced = backward(again, rank, step)
        assert same_on_all_ranks(reduced)
        assert world_size > 2 or same(reduced, backward(ddp, rank, step))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_on_ranks(name, world_size):
    passed(__name__, world_size, name)
