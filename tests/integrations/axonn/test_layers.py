"""Tensor-parallel layers with compact shards are the layers that are not parallel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from axonn import axonn as ax
from axonn.intra_layer import Conv2d, Embedding, Linear, auto_parallelize, optimize_communication
from sparse_comm.integrations import axonn as sparse_axonn
from sparse_comm.integrations.axonn.layers import cut, layers_of, whole
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import Masks, pruned_are_zero, random_masks, zero_pruned_
from tests.integrations.axonn.models import grid, sgd
from tests.integrations.cases import Cases, case, passed

TIMEOUT = 240
CASES: Cases = {}
MODES = ("cached", "transient")

# Sizes of grids by world size.
GRIDS: dict[int, list[dict[str, int]]] = {
    2: [{"G_intra_r": 2}, {"G_intra_c": 2}, {"G_intra_d": 2}, {"G_data": 2}],
    4: [{"G_intra_r": 2, "G_intra_d": 2}],
}
MORE = [{"G_intra_r": 2, "G_intra_c": 2}, {"G_intra_c": 2, "G_data": 2}]  # of four ranks
BATCH = 16
STEPS = 3


def mlp() -> nn.Module:
    """With layers that are not parallel between those that may be."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.GELU(),
        nn.LayerNorm(16),
        nn.Linear(16, 32),
        nn.GELU(),
        nn.Linear(32, 4),
    )


def automatic() -> nn.Module:
    with auto_parallelize():
        return mlp()


class ByHand(nn.Module):
    """As mlp(), in expert mode: the inputs are this rank's columns, and so are activations."""

    def __init__(self) -> None:
        super().__init__()
        layers = (
            Linear(8, 16, expert_mode=True),
            nn.GELU(),
            nn.Identity(),
            Linear(16, 32, expert_mode=True, transpose=True),
            nn.GELU(),
            Linear(32, 4, expert_mode=True),
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        from axonn.intra_layer import Drop, Gather

        handle = ax.comm_handle
        x = Drop.apply(x, handle.inner_intra_layer_parallel_group)
        return Gather.apply(self.layers(x), handle.outer_intra_layer_parallel_group)


class Plain(nn.Module):
    """ByHand, not parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()
        self.layers[2] = nn.Identity()  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convolutions(nn.Module):
    def __init__(self, conv: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = conv(2, 4, 3, padding=1, **options)
        self.norm = nn.GroupNorm(1, 4)
        self.two = conv(4, 8, 1, stride=2, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 2, 2, 2)
        return self.head(self.two(F.gelu(self.norm(self.one(x)))).mean((2, 3)))


class Embedded(nn.Module):
    def __init__(self, embedding: Callable[..., nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = embedding(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens((x * 1e4).long().remainder(12)).mean(1))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.rand(BATCH, 8, generator=generator) * 2 - 1
    return x, x[:, :4].argmax(1)


def part(tensor: Tensor, *axes: str) -> Tensor:
    """Of a batch, what belongs to this rank where ranks along these axes have different parts."""
    config = ax.config
    places = {
        "data": (config.data_parallel_rank, config.G_data),
        "depth": (config.intra_layer_depth_parallel_rank, config.G_intra_d),
        "row": (config.intra_layer_row_parallel_rank, config.G_intra_r),
        "column": (config.intra_layer_column_parallel_rank, config.G_intra_c),
    }
    for axis in axes:
        place, count = places[axis]
        tensor = tensor.chunk(count)[place]
    return tensor


def assert_trains_like_unsharded(
    plain: nn.Module,
    make: Callable[[], nn.Module],
    axes: tuple[str, ...],
    masked: bool = True,
    around: Callable[[nn.Module], Any] = lambda model: contextlib.nullcontext(),
    micro_batches: int = 2,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
    bucket_cap_mb: float | None = 0.0005,
) -> None:
    """Losses and gathered weights, in both modes."""
    masks = random_masks(plain, 0.4) if masked else {}
    zero_pruned_(plain, masks)
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    optimizer = sgd(plain, masks)
    expected = []
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = plain(x)
        loss = F.cross_entropy(out.float(), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for weights in MODES if masked else MODES[:1]:
        model = make()
        load(model, state)
        size = len(part(data(0)[0], *axes)) // micro_batches
        engine = sparse_axonn.InterLayerEngine(
            model,
            F.cross_entropy,
            dtype,
            sparse=masked,
            masks=masks or None,
            weights=weights,
            micro_batch_size=size,
            bucket_cap_mb=bucket_cap_mb,
        )
        optimizer = sgd(model)
        losses = []
        for step in range(STEPS):
            x, y = data(step)
            optimizer.zero_grad()
            with around(model):
                loss = engine.forward_backward_optimizer(part(x, *axes), part(y, *axes), optimizer)
            losses.append(mean_over_ranks(loss))
        assert losses == pytest.approx(expected, rel=tolerance, abs=tolerance), (losses, expected)
        assert_same_weights(model, plain, tolerance)
        assert pruned_are_zero(model)
        if masked:
            assert sum(p.numel() for p in model.parameters()) < sum(
                p.numel() for p in make().parameters()
            )


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    """A whole state into a dense parallel model; AxoNN's convolutions take shards only."""
    state = dict(state)
    for path, layer in layers_of(model):
        if isinstance(layer, Conv2d):
            for name in layer._parameters:
                if (given := state.get(f"{path}.{name}")) is not None:
                    state[f"{path}.{name}"] = cut(layer, name, given)
    model.load_state_dict(state)


def mean_over_ranks(loss: float) -> float:
    import torch.distributed as dist

    total = torch.tensor([loss], dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def assert_same_weights(model: nn.Module, plain: nn.Module, tolerance: float) -> None:
    parallel = dict(layers_of(model))
    assert parallel or "norm" in dict(plain.named_children())
    expected = plain.state_dict()
    for name, tensor in sparse_comm.dense_state_dict(model).items():
        path, _, attribute = name.rpartition(".")
        if path in parallel:
            tensor = whole(parallel[path], attribute, tensor)
        assert torch.allclose(tensor, expected[name], rtol=0, atol=tolerance * 10), name


ALL = ("data", "depth", "row", "column")


@case(CASES)
def layers_of_auto_parallelize(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size] + MORE * (world_size == 4):
        with grid(**sizes):
            assert_trains_like_unsharded(mlp(), automatic, ALL)


@case(CASES)
def layers_of_auto_parallelize_that_share_the_batch(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            assert_trains_like_unsharded(mlp(), automatic, ("data", "depth"))


@case(CASES)
def dense_layers(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            assert_trains_like_unsharded(mlp(), automatic, ALL, masked=False)
            assert_trains_like_unsharded(Plain(), ByHand, ("data", "depth"), masked=False)


@case(CASES)
def layers_in_expert_mode(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size] + MORE * (world_size == 4):
        with grid(**sizes):
            assert_trains_like_unsharded(Plain(), ByHand, ("data", "depth"))


@case(CASES)
def convolutions(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            for options in ({}, {"transpose": True}):
                assert_trains_like_unsharded(
                    Convolutions(nn.Conv2d),
                    lambda options=options: Convolutions(Conv2d, **options),
                    ("data",),
                )


@case(CASES)
def embeddings(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        if "G_intra_c" in sizes:
            continue  # AxoNN splits embeddings by rows and depths only
        with grid(**sizes):
            assert_trains_like_unsharded(
                Embedded(nn.Embedding), lambda: Embedded(Embedding), ("data", "depth")
            )


class Wide(nn.Module):
    """With more than a bucket of parameters that are not parallel, after some that are."""

    def __init__(self) -> None:
        super().__init__()
        self.front = mlp()[:4]  # type: ignore[index]
        self.wide = nn.Parameter(torch.zeros(1024, 32))
        self.more = nn.Parameter(torch.zeros(1024, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.front(x) + self.wide.mean(0) - self.more.sum(0))


def wide(parallel: bool) -> nn.Module:
    with auto_parallelize() if parallel else contextlib.nullcontext():
        torch.manual_seed(0)
        return Wide()


@case(CASES)
def buckets_of_the_measured_size(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            assert_trains_like_unsharded(
                wide(False), lambda: wide(True), ALL, masked=False, bucket_cap_mb=None
            )


@case(CASES)
def mixes_that_cannot_be_averaged_are_refused(rank: int, world_size: int) -> None:
    with grid(**GRIDS[world_size][0]):
        both = nn.Sequential(Linear(8, 8, expert_mode=True), Linear(8, 8))
        with pytest.raises(ValueError, match="Linear layers in expert mode and others"):
            sparse_axonn.InterLayerEngine(both, F.cross_entropy, micro_batch_size=4)
    with grid(**{"G_intra_d": 2, "G_data": world_size // 2}):
        conv = Conv2d(2, 4, 1)
        sparse_axonn.InterLayerEngine(conv, F.cross_entropy, micro_batch_size=4)
        with pytest.raises(ValueError, match=r"scatter_input=False on a grid of several depths"):
            conv(torch.randn(2, 2, 2, 2), scatter_input=False)


@case(CASES)
def bf16(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            assert_trains_like_unsharded(
                mlp(), automatic, ALL, dtype=torch.bfloat16, tolerance=3e-2
            )


@case(CASES)
def axonns_overlap(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            assert_trains_like_unsharded(
                mlp(),
                automatic,
                ALL,
                around=lambda model: optimize_communication(True, True, True, model),
            )


@case(CASES)
def states_of_whole_weights_shards_and_values_load(rank: int, world_size: int) -> None:
    for sizes in GRIDS[world_size]:
        with grid(**sizes):
            plain = mlp()
            masks = random_masks(plain)
            zero_pruned_(plain, masks)
            dense = automatic()
            dense.load_state_dict(plain.state_dict())
            own = shards_of(masks, dense)
            states = (plain.state_dict(), dense.state_dict())
            states += (sparse_comm.compact(automatic_of(plain), own).state_dict(),)
            for state in states:
                model = automatic()
                engine = sparse_axonn.InterLayerEngine(
                    model, F.cross_entropy, torch.float32, sparse=True, masks=masks,
                    micro_batch_size=4,
                )  # fmt: skip
                model.load_state_dict(dict(state))
                assert_same_weights(engine.model, plain, 0.0)
            state = dict(states[2])
            state["0._extra_state"] = state["0._extra_state"] ^ 1
            with pytest.raises(RuntimeError, match=r"'0\.weight' holds the values of another"):
                model.load_state_dict(state)


@case(CASES)
def masks_that_do_not_fit_are_refused_on_all_ranks(rank: int, world_size: int) -> None:
    with grid(**GRIDS[world_size][0]):
        masks = random_masks(mlp())

        def engine(masks: Masks) -> Any:
            return sparse_axonn.InterLayerEngine(
                automatic(), F.cross_entropy, sparse=True, masks=masks, micro_batch_size=4
            )

        with pytest.raises(ValueError, match=r"'0\.weight' has shape \(3, 8\).*\(16, 8\)"):
            engine(masks | {"0.weight": torch.ones(3, 8, dtype=torch.bool)})
        with pytest.raises(ValueError, match=r"'9\.weight'.*did you mean"):
            engine(masks | {"9.weight": torch.ones(3, 8, dtype=torch.bool)})


def shards_of(masks: Masks, model: nn.Module) -> Masks:
    parallel = dict(layers_of(model))
    return {
        name: cut(parallel[path], "weight", mask)
        for name, mask in masks.items()
        if (path := name.rpartition(".")[0]) in parallel
    }


def automatic_of(plain: nn.Module) -> nn.Module:
    model = automatic()
    model.load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("world_size", GRIDS)
@pytest.mark.parametrize("name", CASES)
def test_layers(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
