"""torch's pipelines with packed sends train what they train with their own, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sparse_comm.integrations.pytorch import pack_sends
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

import sparse_comm
from tests.integrations.cases import Cases, case, on_two, passed

CASES: Cases = {}
TIMEOUT = 200
CODECS = ["auto", "channels", "zeros"]
SAMPLES = 8


def mlp(index: int, count: int) -> nn.Module:
    """Ends in a ReLU wherever another stage follows."""
    widths = [24, 40, 40, 40, 40, 5]
    layers: list[nn.Module] = [nn.Linear(widths[index], widths[index + 1])]
    if index == count - 1:
        layers = [nn.Linear(widths[index], 16), nn.ReLU(), nn.Linear(16, 5)]
    else:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def masks_of_stage(stage: nn.Module) -> dict[str, Tensor]:
    """Rows, columns and single entries."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for name, parameter in stage.named_parameters():
        if parameter.ndim == 2:
            mask = torch.rand(parameter.shape, generator=generator) < 0.5
            mask[:, torch.rand(parameter.shape[1], generator=generator) < 0.3] = False
            masks[name] = mask
    return masks


def train(
    make: Callable[[int, int], nn.Module],
    codec: str | None,
    schedule: type = Schedule1F1B,
    steps: int = 6,
    stages_a_rank: int = 1,
    micro_batches: int = 4,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    compact: bool = True,
    data: Callable[[int], Any] | None = None,
    then: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Losses, and the dense weights after the last step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = world * stages_a_rank
    modules, stages, optimizers = [], [], []
    for index in range(rank, count, world):
        torch.manual_seed(index)
        module = make(index, count)
        if compact:
            sparse_comm.compact(module, masks_of_stage(module))
        modules.append(module)
        optimizers.append(torch.optim.AdamW(module.parameters(), lr=2e-2, foreach=False))
        stages.append(PipelineStage(module, index, count, torch.device("cpu")))
    built = schedule(stages if stages_a_rank > 1 else stages[0], micro_batches, loss_fn=loss_fn)
    if codec is not None:
        pack_sends(stages, codec, **options)
        if then is not None:
            pack_sends(stages, then)
    losses: list[float] = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(SAMPLES, 24, generator=generator)
        y = x[:, :5].argmax(1)
        inputs = (data(step) if data is not None else (x,)) if rank == 0 else ()
        found: list[Tensor] = []
        torch.manual_seed(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        if rank == (count - 1) % world:
            built.step(*inputs, target=y, losses=found)
            losses += [loss.item() for loss in found]
        else:
            built.step(*inputs)
        for optimizer in optimizers:
            optimizer.step()
    weights = [sparse_comm.dense_state_dict(module) for module in modules]
    ends = [getattr(stage, "_sparse_comm", None) for stage in stages]
    return {"losses": losses, "weights": weights, "ends": ends, "stages": stages, "built": built}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["losses"] == other["losses"]
    for a, b in zip(one["weights"], other["weights"], strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name


def sent_bytes(result: dict[str, Any]) -> tuple[int, int]:
    """Dense, and sent."""
    dense = sent = 0
    for plan in result["ends"]:
        for boundary in (plan.ends.before, plan.ends.behind):
            if boundary is not None:
                traffic, _ = boundary.take_traffic()
                dense, sent = dense + traffic.dense, sent + traffic.sent
    return dense, sent


@case(CASES)
def fifty_steps_in_every_codec(rank: int, world_size: int) -> None:
    plain = train(mlp, None, steps=50)
    assert sum(plain["losses"][-8:]) <= 0.99 * sum(plain["losses"][:8])
    for codec in CODECS:
        same(plain, train(mlp, codec, steps=50))


@case(CASES)
def every_schedule(rank: int, world_size: int) -> None:
    for schedule, stages in (
        (ScheduleGPipe, 1),
        (ScheduleInterleaved1F1B, 2),
        (ScheduleInterleavedZeroBubble, 2),
    ):
        if world_size * stages > 5:
            continue
        plain = train(mlp, None, schedule, stages_a_rank=stages)
        for codec in CODECS:
            same(plain, train(mlp, codec, schedule, stages_a_rank=stages))


def share_sent(*behind: nn.Module) -> float:
    """Of the bytes of stages that end in a ReLU and in ``behind``; they train as without."""

    def wide(index: int, count: int) -> nn.Module:
        return nn.Sequential(nn.Linear(24 if index == 0 else 4000, 4000), nn.ReLU(), *behind)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    zeros = train(wide, "zeros", loss_fn=loss, steps=2)
    same(train(wide, None, loss_fn=loss, steps=2), zeros)
    dense, sent = sent_bytes(zeros)
    return sent / dense


@case(CASES)
@on_two
def fewer_bytes_are_sent(rank: int, world_size: int) -> None:
    """In both directions: on each rank what it sends."""
    assert 0.3 < share_sent() < 0.6


@case(CASES)
@on_two
def dropout_in_a_row_of_layers_needs_no_bitmap_of_its_own(rank: int, world_size: int) -> None:
    assert 0.3 < share_sent(nn.Dropout(0.2)) < 0.5


class Several(nn.Module):
    """Gives a float, an integer and a bool tensor, and one without gradient; each is used."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.first, self.last = index == 0, index == count - 1
        self.linear = nn.Linear(24, 5 if self.last else 24)

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        if self.first:
            others = ((x * 9).long(), x > 0, x.detach() * 2)
        number, flag, fixed = others
        y = self.linear(x + fixed * number.clamp(-3, 3) * flag)
        return y if self.last else (torch.relu(y), number + 1, ~flag, fixed)


@case(CASES)
def several_tensors_pass(rank: int, world_size: int) -> None:
    plain = train(Several, None)
    for codec in CODECS:
        same(plain, train(Several, codec))


class Unused(nn.Module):
    """Does not use its second input, which has no gradient then."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.first, self.last = index == 0, index == count - 1
        self.linear = nn.Linear(24, 5 if self.last else 24)

    def forward(self, x: Tensor, unused: Tensor | None = None) -> Any:
        y = self.linear(x)
        return y if self.last else (torch.relu(y), y.sigmoid())


@case(CASES)
@on_two
def an_input_that_is_not_used(rank: int, world_size: int) -> None:
    plain = train(Unused, None)
    same(plain, train(Unused, "zeros"))


@case(CASES)
@on_two
def dropout_and_half_precision(rank: int, world_size: int) -> None:
    def make(index: int, count: int) -> nn.Module:
        end = nn.Linear(24, 5) if index == count - 1 else nn.Linear(24, 24)
        stage = nn.Sequential(end, nn.ReLU(), nn.Dropout(0.5)) if index < count - 1 else end
        return stage.bfloat16()

    def data(step: int) -> Any:
        generator = torch.Generator().manual_seed(step)
        return (torch.randn(SAMPLES, 24, generator=generator).bfloat16(),)

    plain = train(make, None, data=data)
    for codec in CODECS:
        same(plain, train(make, codec, data=data))


class LookedAt(nn.Module):
    """A ReLU whose gradient is scaled by its norm, and a view of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / gradient.norm())
        return y.view(-1, 2, y.shape[1] // 2).flatten(1)


@case(CASES)
@on_two
def a_hook_within_a_stage_sees_the_whole_gradient(rank: int, world_size: int) -> None:
    def hooked(index: int, count: int) -> nn.Module:
        layers = mlp(index, count)
        return layers if index == count - 1 else nn.Sequential(layers[0], LookedAt())

    plain = train(hooked, None)
    for codec in CODECS:
        same(plain, train(hooked, codec))


@case(CASES)
@on_two
def what_torch_cannot_send_stays_in_messages(rank: int, world_size: int) -> None:
    """Outputs that are not contiguous, where ``auto`` finds nothing to leave out."""

    class Transposed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return torch.stack([y, y], -1).select(-1, 0) if rank == 0 else y

    def transposed(index: int, count: int) -> nn.Module:
        return Transposed(24, 24 if index == 0 else 5)

    found = [train(transposed, codec, compact=False, steps=4) for codec in ("zeros", "auto")]
    same(*found)


@case(CASES)
@on_two
def a_copy_of_a_stage_is_none_of_the_pipeline(rank: int, world_size: int) -> None:
    """Of an EMA, say: it takes and gives all channels."""
    (stage,) = train(mlp, "auto", steps=2)["stages"]
    module = stage.submod
    x = torch.randn(3, 24 if rank == 0 else 40)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    copies = [copy.deepcopy(module), torch.load(stored, weights_only=False)]
    outputs = [one(x) for one in copies]
    if rank > 0:
        with pytest.raises(ValueError, match="is called by its pipeline only"):
            module(x)
    assert all(torch.equal(output, module.forward(x)) for output in outputs)  # without hooks


@case(CASES)
@on_two
def nan_and_inf_arrive(rank: int, world_size: int) -> None:
    def data(step: int) -> Any:
        x = torch.randn(SAMPLES, 24)
        x[0, 0], x[3, 3] = torch.inf, torch.nan
        return (x,)

    plain = train(mlp, None, data=data, steps=1, compact=False)
    zeros = train(mlp, "zeros", data=data, steps=1, compact=False)
    for a, b in zip(plain["weights"], zeros["weights"], strict=True):
        for name in a:
            assert torch.equal(a[name].isnan(), b[name].isnan())
            assert torch.equal(a[name].nan_to_num(), b[name].nan_to_num())
    assert str(plain["losses"]) == str(zeros["losses"])


@case(CASES)
def evaluation_between_steps(rank: int, world_size: int) -> None:
    outputs = []
    for codec in (None, "zeros"):
        result = train(mlp, codec, steps=2)
        x = torch.randn(SAMPLES, 24, generator=torch.Generator().manual_seed(5))
        target = torch.zeros(SAMPLES, dtype=torch.long)
        last = {"target": target} if rank == world_size - 1 else {}
        for _ in range(2):
            out = result["built"].eval(*((x,) if rank == 0 else ()), **last)
        outputs.append(out)
        result["built"].step(*((x,) if rank == 0 else ()), **last)
    if rank == world_size - 1:
        assert torch.equal(*outputs)


@case(CASES)
def a_changed_mask_is_noticed_and_planned_anew(rank: int, world_size: int) -> None:
    result = train(mlp, "auto", steps=3)
    (stage,) = result["stages"]
    module = stage.submod
    grown = {n: torch.ones_like(mask) for n, mask in sparse_comm.masks_of(module).items()}
    sparse_comm.update_masks(module, grown)
    x = torch.randn(SAMPLES, 24)
    inputs = (x,) if rank == 0 else ()
    target = {"target": torch.zeros(SAMPLES, dtype=torch.long)} if rank == world_size - 1 else {}
    with pytest.raises(RuntimeError, match="have changed since its sends were planned"):
        result["built"].step(*inputs, **target)
    pack_sends(stage, "auto")
    result["built"].step(*inputs, **target)
    assert stage._sparse_comm.ends.channels == (None, None)


@case(CASES)
def bad_input_is_refused_on_all_ranks(rank: int, world_size: int) -> None:
    stage = PipelineStage(mlp(rank, world_size), rank, world_size, torch.device("cpu"))
    with pytest.raises(ValueError, match="one of 'auto', 'channels', 'dense', 'zeros', got 'lz4'"):
        pack_sends(stage, "lz4")
    with pytest.raises((ValueError, RuntimeError), match="got 'none'"):
        pack_sends(stage, "none" if rank == 0 else "zeros")
    with pytest.raises(ValueError, match="the boundary between stages 0 and 1: stage 0 has pipe"):
        pack_sends(stage, "dense" if rank == 0 else "zeros")
    with pytest.raises(ValueError, match="the boundary between stages 0 and 1"):
        pack_sends(stage, "zeros", checksum=rank == 0)


@case(CASES)
@on_two
def dense_again(rank: int, world_size: int) -> None:
    """Before the first step, and after some."""
    plain = train(mlp, None, steps=4)
    result = train(mlp, "zeros", steps=2)
    (stage,) = result["stages"]
    packed_class = type(stage)
    pack_sends(stage, "dense")
    assert type(stage) is PipelineStage
    assert packed_class is not PipelineStage
    assert not hasattr(stage, "_sparse_comm")
    result = train(mlp, "zeros", steps=4, then="dense")
    same(plain, result)


@case(CASES)
@on_two
def sizes_that_torch_has_settled_stay(rank: int, world_size: int) -> None:
    result = train(mlp, "channels", steps=2)
    (stage,) = result["stages"]
    for codec in ("dense", "channels"):
        masks = sparse_comm.masks_of(stage.submod)
        grown = {name: torch.ones_like(mask) for name, mask in masks.items()}
        sparse_comm.update_masks(stage.submod, grown)
        with pytest.raises(RuntimeError, match="would send other channels than in its first step"):
            pack_sends(stage, codec)
    module = mlp(rank, world_size)
    sparse_comm.compact(module, masks_of_stage(module))
    x, y = torch.zeros(2, 24 if rank == 0 else 40), torch.zeros(2, 5 if rank else 40)
    static = PipelineStage(module, rank, 2, torch.device("cpu"), input_args=x, output_args=y)
    with pytest.raises(ValueError, match="was built with input_args or output_args"):
        pack_sends(static, "channels")


@case(CASES)
@on_two
def a_stage_that_is_left_out_is_named(rank: int, world_size: int) -> None:
    made = [
        PipelineStage(mlp(index, 4), index, 4, torch.device("cpu")) for index in (rank, rank + 2)
    ]
    with pytest.raises(ValueError, match="stages 2, 3 of 4 are missing"):
        pack_sends(made[:1])


@case(CASES)
@on_two
def statistics_of_norms_are_not_spoilt_by_the_first_step(rank: int, world_size: int) -> None:
    """torch runs stages on memory that nobody has written, to learn shapes."""

    def make(index: int, count: int) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 24 if index == 0 else 5))

    result = train(make, "zeros", steps=3, compact=False)
    norm = result["stages"][0].submod[0]
    assert norm.num_batches_tracked == 3 * 4
    assert norm.running_mean.abs().max() < 10


@case(CASES)
@on_two
def a_checksum_changes_nothing_else(rank: int, world_size: int) -> None:
    same(train(mlp, None), train(mlp, "zeros", checksum=True))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_pipelines(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
