"""What ``auto`` chooses between real processes, on links of known speed and with slow codecs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sparse_comm.pipeline import Boundary, TorchWire, Zeros
from sparse_comm.pipeline.auto import Choice, choose
from sparse_comm.pipeline.wire import Message
from tests.integrations.cases import Cases, case, passed

CASES: Cases = {}
NUMEL = 1 << 15
BYTES_A_SECOND = 4e6  # of the slow wire: 33 ms for NUMEL floats


class SlowWire(TorchWire):
    """gloo's messages, which take as long to leave as their bytes would on a slow link."""

    def send(self, tensor: Tensor) -> Message:
        time.sleep(tensor.numel() / BYTES_A_SECOND)
        return super().send(tensor)


class SlowZeros(Zeros):
    """Zeros on a slow core."""

    def write(self, room, tensor, kept):
        time.sleep(0.05)
        return super().write(room, tensor, kept)


def decided(rank: int, tag: int, zeros: float, *, relu: bool, codec=None, wire=SlowWire) -> Choice:
    """After five micro-batches, of which such a part of the activations is zero."""
    forward, back = (wire(None, 1 - rank, tag + n) for n in (0, 1))
    out, from_there = (forward, back) if rank == 0 else (back, forward)
    chosen = Zeros() if codec is None else codec
    boundary = Boundary("stages 0 and 1", chosen, out, from_there, writes=rank == 0)
    for number in range(5):
        x = torch.rand(NUMEL, generator=torch.Generator().manual_seed(number)) - zeros
        if rank == 0:
            activations = torch.relu(x.requires_grad_()) if relu else x.clamp(min=0)
            boundary.send([activations], number)
            boundary.receive(number)
        else:
            boundary.receive(number)
            boundary.send([torch.ones(NUMEL)], number)
    boundary.flush()
    choice = choose(boundary, None)
    boundary.flush()
    dist.barrier()
    return choice


@case(CASES)
def zeros_are_left_out_of_a_slow_link(rank: int, world_size: int) -> None:
    choice = decided(rank, 100, 0.9, relu=True)
    assert (choice.codec.name, choice.both_dense) == ("zeros", False)
    assert choice.text.count("zeros, ") == 2
    assert f"of {4 * NUMEL:,} bytes" in choice.text


@case(CASES)
def each_direction_is_chosen_for_itself(rank: int, world_size: int) -> None:
    """No ReLU is known of, so that gradients have no zeros."""
    choice = decided(rank, 200, 0.9, relu=False)
    assert choice.codec.name == ("zeros" if rank == 0 else "dense")
    assert not choice.both_dense
    assert "nothing to leave out" in choice.text


@case(CASES)
def nothing_to_leave_out_is_the_frameworks_again(rank: int, world_size: int) -> None:
    choice = decided(rank, 300, 0.0, relu=True)
    assert (choice.codec.name, choice.both_dense) == ("dense", True)
    assert choice.text.count("nothing to leave out") == 2


@case(CASES)
def zeros_that_cost_more_than_they_save_are_sent(rank: int, world_size: int) -> None:
    choice = decided(rank, 400, 0.5, relu=True, codec=SlowZeros())
    assert (choice.codec.name, choice.both_dense) == ("dense", True)
    assert choice.text.count("without zeros") == 2


@case(CASES)
def a_small_message_between_cores_goes_as_it_is(rank: int, world_size: int) -> None:
    """Both take some 0.1 ms: either may be chosen, and both ends agree."""
    choice = decided(rank, 500, 0.9, relu=True, wire=TorchWire)
    found = [None, None]
    dist.all_gather_object(found, (choice.codec.name, choice.both_dense))
    assert found[0][1] == found[1][1] == (found[0][0] == found[1][0] == "dense")


@pytest.mark.parametrize("name", CASES)
def test_between_two_processes(name: str) -> None:
    passed(__name__, 2, name)
