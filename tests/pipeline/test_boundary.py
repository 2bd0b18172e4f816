"""Messages between real processes: sizes that grow, damage, and a neighbour that dies."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from sparse_comm.pipeline import (
    Boundary,
    Dense,
    MessageError,
    Origin,
    TorchWire,
    Zeros,
    set_origin,
)
from tests.integrations.cases import Cases, case, passed
from tests.launch import outcomes

CASES: Cases = {}


def end(rank: int, tag: int = 100, **options) -> Boundary:
    """Rank 0 writes, rank 1 reads."""
    forward, back = (TorchWire(None, 1 - rank, tag + n) for n in (0, 1))
    out, from_there = (forward, back) if rank == 0 else (back, forward)
    return Boundary("stages 0 and 1", Zeros(), out, from_there, writes=rank == 0, **options)


@case(CASES)
def sizes_may_change_from_message_to_message(rank: int, world_size: int) -> None:
    boundary = end(rank)
    sizes = [0, 10, 100_000, 50, 300_000, 3, 299_999, 1_000_000, 1]
    sent = [torch.relu(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in sizes]
    for number, tensor in enumerate(sent):
        if rank == 0:
            boundary.send([tensor, torch.tensor(number)], number)
        else:
            boundary.expect(number)
            boundary.expect(min(number + 1, len(sizes) - 1))
            x, n = boundary.receive(number)
            assert torch.equal(x, tensor)
            assert n == number
    boundary.flush()


@case(CASES)
def many_messages_are_sent_before_any_is_received(rank: int, world_size: int) -> None:
    """A stage may run ahead of the next one."""
    boundary = end(rank, 200)
    if rank == 0:
        for number in range(60):
            boundary.send([torch.full((5000,), float(number))], number)
        dist.barrier()
        boundary.flush()
    else:
        dist.barrier()
        for number in range(60):
            (tensor,) = boundary.receive(number)
            assert torch.equal(tensor, torch.full((5000,), float(number)))


@case(CASES)
def both_directions_at_once(rank: int, world_size: int) -> None:
    boundary = end(rank, 300, checksum=True)
    for number in range(20):
        tensor = torch.randn(4000, requires_grad=True)
        boundary.send([torch.relu(tensor) if rank == 0 else tensor.detach()], number)
    for number in range(20):
        boundary.receive(number)
    boundary.flush()
    sent, received = boundary.take_traffic()
    assert sent.messages == received.messages == 20
    assert sent.dense == received.dense == 20 * 16000


@case(CASES)
def a_long_training_leaves_nothing_behind(rank: int, world_size: int) -> None:
    """Neither times of its messages nor what their tensors were made from."""
    boundary = end(rank, 700)
    for number in range(200):
        if rank == 0:
            x = torch.relu(torch.ones(5, requires_grad=True))
            set_origin(x, Origin(source=torch.relu(x)))
            boundary.send([x], number % 2)
            assert not hasattr(x, "_sparse_comm_origin")
        else:
            boundary.receive(number % 2)
    boundary.flush()
    sent, received = boundary.take_traffic()
    assert (sent if rank == 0 else received).messages == 200
    assert max(len(sent.seconds), len(received.seconds)) < 100


@case(CASES)
def what_was_sent_may_be_written_to(rank: int, world_size: int) -> None:
    boundary = end(rank, 400)
    for codec in (Dense(), Zeros()):
        boundary.codec = codec
        tensor = torch.relu(torch.arange(-5000.0, 5000))
        if rank == 0:
            boundary.send([tensor], 0)
            tensor.zero_()
            dist.barrier()
        else:
            dist.barrier()
            assert torch.equal(boundary.receive(0)[0], tensor)
    boundary.flush()


@case(CASES)
def damage_names_the_boundary(rank: int, world_size: int) -> None:
    boundary = end(rank, 500)
    if rank == 0:
        dist.send(torch.arange(64, dtype=torch.uint8), 1, tag=500)
    else:
        with pytest.raises(MessageError, match="stages 0 and 1: a message starts with b'SpCm'"):
            boundary.receive(0)


@case(CASES)
def another_micro_batch_is_refused(rank: int, world_size: int) -> None:
    boundary = end(rank, 600)
    if rank == 0:
        boundary.send([torch.ones(3)], 7)
        boundary.flush()
    else:
        with pytest.raises(
            RuntimeError, match="stages 0 and 1: micro-batch 0 was expected, 7 came"
        ):
            boundary.receive(0)


@pytest.mark.parametrize("name", CASES)
def test_between_two_processes(name: str) -> None:
    passed(__name__, 2, name)


def _dies(rank: int, world_size: int) -> None:
    boundary = end(rank)
    if rank == 0:
        os._exit(3)
    time.sleep(0.5)
    boundary.receive(0)


def test_a_neighbour_that_dies_is_an_error():
    died, waited = outcomes(_dies, 2, timeout=60)
    assert "exit code 3" in str(died.error)
    assert isinstance(waited.error, RuntimeError)
    assert "boundary.receive" in waited.traceback
