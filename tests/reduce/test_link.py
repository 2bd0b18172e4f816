"""The link as measured, alike on all ranks, and the bucket size that follows from it."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given

from sparse_comm.reduce import Link, bucket_cap_mb, measure_link
from sparse_comm.reduce.link import _link_of
from tests.integrations.cases import Cases, case, passed
from tests.reduce.ranks import of_all_ranks

CASES: Cases = {}
MIB = 1 << 20

latencies = st.floats(1e-6, 1e-1)
rates = st.floats(1e5, 1e12)
totals = st.floats(1, 1e12)


@case(CASES)
def all_ranks_measure_the_same_link(rank: int, world_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        link = measure_link(dtype=dtype)
        assert of_all_ranks(link) == [link] * world_size
        assert 0 < link.latency_s < 60
        assert 0 < link.bytes_per_s < math.inf


@case(CASES)
def a_group_measures_its_own_link(rank: int, world_size: int) -> None:
    pair = dist.new_group([0, 1])
    if rank < 2:
        assert measure_link(pair).latency_s > 0
    dist.barrier()
    alone = [dist.new_group([member]) for member in range(world_size)]
    assert measure_link(alone[rank]) == Link(0.0, math.inf)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_on_ranks(name, world_size):
    passed(__name__, world_size, name)


@pytest.mark.parametrize("added", [0.0, 1e-4, 3e-3])
@pytest.mark.parametrize("bytes_per_s", [1e8, 1e10])
def test_a_link_is_found_from_the_times_it_takes(bytes_per_s, added):
    """``added``: by each collective where many are under way, as on cores that ranks share."""
    alone, size = 5e-4, 1 << 20
    together = alone + 4 * size / bytes_per_s  # the latencies of four overlap
    link = _link_of(alone, together, together + 28 * added, size)
    assert link.latency_s == pytest.approx(max(alone, added))
    assert link.bytes_per_s == pytest.approx(bytes_per_s, rel=0.5)


@given(latencies, rates, totals)
def test_no_other_size_waits_less(latency, rate, total):
    """Of the sizes that are sensible: a collective a bucket, and a last bucket that is exposed."""

    def waits(size: float) -> float:
        return latency * total / size + size / rate

    best = bucket_cap_mb(Link(latency, rate), total) * MIB
    assert MIB / 16 <= best <= 25 * MIB
    for other in (best * 0.9, best * 1.1):
        if MIB / 16 <= other <= 25 * MIB:
            assert waits(best) <= waits(other) * (1 + 1e-9)


def test_a_gigabit_link_and_a_loopback_get_buckets_of_their_order():
    assert bucket_cap_mb(Link(3e-4, 1.17e8), 6e6) == pytest.approx(0.4376, rel=1e-3)
    assert bucket_cap_mb(Link(2e-4, 1e9), 6e6) == pytest.approx(1.0447, rel=1e-3)


def test_a_link_that_costs_nothing_gets_ddps_default():
    assert bucket_cap_mb(Link(0.0, math.inf), 1e9) == 25
    assert bucket_cap_mb(Link(0.0, 1e9), 1e9) == 1 / 16
