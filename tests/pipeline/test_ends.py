"""What stages agree on before they send, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparse_comm
from sparse_comm.pipeline import Zeros, compare, describe, has_messages


def test_codecs_that_have_messages_need_cpus_and_gloo():
    assert has_messages("zeros", "cpu")
    assert has_messages("auto", torch.device("cpu"))
    assert has_messages(Zeros(), "cpu")
    assert not has_messages("dense", "cuda", "nccl")
    assert not has_messages("channels", "cuda", "nccl")
    assert not has_messages("auto", "cuda", "nccl")
    for codec in ("zeros", Zeros()):
        with pytest.raises(ValueError, match="'zeros' sends messages of changing size, which need"):
            has_messages(codec, "cuda", "nccl")
        with pytest.raises(ValueError, match="here are cpu and mpi"):
            has_messages(codec, "cpu", "mpi")


def stage(pruned: int) -> nn.Module:
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[:, pruned] = False
    module = nn.Sequential(nn.Linear(6, 6, bias=False))
    return sparse_comm.compact(module, {"0.weight": mask})


def test_the_boundary_where_codecs_differ_is_named():
    stages = [describe(n, stage(n), "zeros" if n < 2 else "auto") for n in range(3)]
    with pytest.raises(ValueError, match="the boundary between stages 1 and 2: stage 1 has pipe"):
        compare(stages)
    stages = [describe(n, stage(n), "zeros", checksum=n == 0) for n in range(3)]
    with pytest.raises(ValueError, match="the boundary between stages 0 and 1"):
        compare(stages)


def test_replicas_with_other_masks_are_refused():
    of_replicas = [describe(0, stage(n), "auto") for n in (0, 1)]
    with pytest.raises(ValueError, match="replicas of stage 0 have different masks"):
        compare(of_replicas)


def test_channels_are_planned_for_each_boundary():
    described = [describe(n, stage(n), "auto") for n in range(3)]
    planned = compare(described[::-1])
    assert sorted(planned) == [0, 1]
    assert planned[0].kept.tolist() == [0, 2, 3, 4, 5]
    assert planned[1].kept.tolist() == [0, 1, 3, 4, 5]


def test_zeros_alone_leaves_channels():
    described = [describe(n, stage(n), "zeros") for n in range(2)]
    assert compare(described) == {0: None}


def test_missing_stages_are_named():
    with pytest.raises(ValueError, match="stages 1, 3 of 4 are missing: give all stages of a rank"):
        compare([describe(n, stage(n), "auto") for n in (0, 2)], 4)


def test_dense_stages_keep_the_gradients_of_all_channels():
    """Clipping by norm looks at those of pruned weights, too."""
    assert describe(0, nn.Sequential(nn.Linear(6, 6)), "channels").reads is None
