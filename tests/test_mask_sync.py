"""Every rank ends with the same masks, or every rank stops and says where they differ."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import sparse_comm
from sparse_comm.mask_sync import broadcast_masks, compare_digests
from tests.launch import outcomes, run

SHAPES = {"blocks.0.weight": (13, 7), "größe": (4, 4, 3), "0-d": (), "empty": (0, 5), "a": (4097,)}


def masks_of_rank(rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {name: torch.rand(shape, generator=generator) < 0.4 for name, shape in SHAPES.items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype == torch.bool and a[n].shape == b[n].shape and a[n].equal(b[n])
        for n in a
    )


def messages(ended: list) -> list[str]:
    """The text of each rank's ValueError; fails for a rank that returned or hung."""
    for outcome in ended:
        assert isinstance(outcome.error, ValueError), outcome.traceback or outcome
    return [str(outcome.error) for outcome in ended]


# ---------------------------------------------------------------- broadcast_masks


def broadcast_what_each_rank_has(rank: int, world_size: int, src: int) -> dict:
    mine = [masks_of_rank(rank), None, {}, {"other": torch.ones(2, dtype=torch.bool)}]
    return broadcast_masks(masks_of_rank(rank) if rank == src else mine[rank], src=src)


@pytest.mark.parametrize("src", [0, 2])
def test_every_rank_ends_with_the_sources_masks_in_its_order(src):
    for masks in run(broadcast_what_each_rank_has, 3, src):
        assert are_equal(masks, masks_of_rank(src))


def broadcast_in_a_subgroup(rank: int, world_size: int) -> object:
    group = dist.new_group([1, 2])
    if rank == 0:
        with pytest.raises(ValueError, match="rank 0 is not in the process group"):
            broadcast_masks(masks_of_rank(0), src=2, group=group)
        return None
    return broadcast_masks(masks_of_rank(rank), src=2, group=group)


def test_src_is_a_global_rank_and_only_the_group_takes_part():
    outside, *inside = run(broadcast_in_a_subgroup, 3)
    assert outside is None
    assert all(are_equal(masks, masks_of_rank(2)) for masks in inside)


def broadcast_nothing(rank: int, world_size: int) -> dict:
    return broadcast_masks({} if rank == 0 else None)


def test_no_masks_are_masks_too():
    assert run(broadcast_nothing, 2) == [{}, {}]


def broadcast_bad_masks(rank: int, world_size: int, bad: object) -> None:
    broadcast_masks(bad if rank == 1 else masks_of_rank(rank), src=1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "masks must be a dict of bool tensors by name, got NoneType"),
        ({"w": torch.ones(3)}, "mask for 'w' must have dtype torch.bool, got torch.float32"),
    ],
)
def test_bad_masks_on_the_source_stop_every_rank_with_the_reason(bad, message):
    ended = outcomes(broadcast_bad_masks, 3, bad, timeout=60)
    assert isinstance(ended[1].error, TypeError) and message in str(ended[1].error)
    for text in messages([ended[0], ended[2]]):
        assert text.startswith("rank 1 has no masks to broadcast: TypeError: ") and message in text


def broadcast_from_nowhere(rank: int, world_size: int) -> None:
    broadcast_masks(masks_of_rank(rank), src=7)


def test_a_source_outside_the_group_stops_every_rank():
    for text in messages(outcomes(broadcast_from_nowhere, 2, timeout=60)):
        assert text == "src is global rank 7, but the group has ranks 0-1"


def test_without_a_process_group_the_masks_come_back():
    masks = masks_of_rank(0)
    returned = broadcast_masks(masks)
    assert are_equal(returned, masks) and returned is not masks
    with pytest.raises(TypeError, match="got NoneType"):
        broadcast_masks(None)


def test_in_a_world_of_one_the_masks_come_back():
    (masks,) = run(broadcast_what_each_rank_has, 1, 0)
    assert are_equal(masks, masks_of_rank(0))


# ---------------------------------------------------------------- compare_digests


def compare(rank: int, world_size: int, digests: list[dict[str, str]]) -> None:
    compare_digests(digests[rank])


def test_equal_digests_pass_in_any_order_of_names():
    digests = [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "2"}]
    assert run(compare, 3, digests) == [None] * 3
    assert run(compare, 2, [{}, {}]) == [None] * 2


@pytest.mark.parametrize(
    ("digests", "expected"),
    [
        (
            [{"blocks.0.weight": "1"}, {"blocks.0.weight": "2"}, {"blocks.0.weight": "1"}],
            "'blocks.0.weight' is masked differently on rank 1 than on ranks 0, 2.",
        ),
        (
            [{"a": "1", "b": "1"}, {"b": "1"}, {"a": "1", "b": "1"}],
            "'a' is masked on ranks 0, 2 but not on rank 1.",
        ),
        ([{}, {"a": "1"}, {}], "'a' is masked on rank 1 but not on ranks 0, 2."),
        (
            [{"a": "1"}, {"a": "2"}, {"a": "3"}],
            "'a' is masked differently on rank 1 than on rank 0 and masked differently on rank 2 "
            "than on rank 0.",
        ),
        (
            [{"a": "1"}, {"a": "2"}, {}],
            "'a' is masked differently on rank 1 than on rank 0 and masked on ranks 0-1 but not "
            "on rank 2.",
        ),
        (
            [{f"layer.{i}": str(r if i else 0) for i in range(9)} for r in (0, 0, 1)],
            "'layer.5' is masked differently on rank 2 than on ranks 0-1; and 3 more parameters.",
        ),
    ],
)
def test_a_difference_stops_every_rank_with_one_message_naming_parameter_and_ranks(
    digests, expected
):
    texts = messages(outcomes(compare, 3, digests, timeout=60))
    assert len(set(texts)) == 1
    assert texts[0].startswith("masks differ between ranks: ") and expected in texts[0]
    assert texts[0].endswith("call sparse_comm.broadcast_masks(masks) before compact")


def compare_in_a_subgroup(rank: int, world_size: int) -> None:
    group = dist.new_group([0, 2])
    if rank != 1:
        compare_digests({"a": str(rank)}, group)


def test_ranks_in_the_message_are_global_ones():
    ended = outcomes(compare_in_a_subgroup, 3, timeout=60)
    assert ended[1].error is None
    for text in messages([ended[0], ended[2]]):
        assert "'a' is masked differently on rank 2 than on rank 0" in text


def compare_real_masks(rank: int, world_size: int, same: bool) -> None:
    masks = masks_of_rank(rank)
    if same:
        masks = broadcast_masks(masks)
    compare_digests({n: sparse_comm.SparsityPattern(m).digest() for n, m in masks.items()})


def test_masks_that_differ_are_noticed_and_broadcasting_them_mends_it():
    assert run(compare_real_masks, 3, True) == [None] * 3
    for text in messages(outcomes(compare_real_masks, 3, False, timeout=60)):
        assert "'blocks.0.weight' is masked differently on rank 1 than on rank 0" in text


def test_one_process_has_nothing_to_compare():
    compare_digests({"a": "1"})
    assert run(compare, 1, [{"a": "1"}]) == [None]
