"""DeepSpeed's pipelines with packed sends train what they train with their own, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule
from sparse_comm.integrations.deepspeed import initialize, pack_sends
from torch import Tensor, nn

import sparse_comm
from tests.integrations.cases import Cases, case, on_two, passed
from tests.launch import shared_folder

from .training import BASE, BATCH, CLASSES, WIDTH, Config, block, merged, on_first

CASES: Cases = {}
TIMEOUT = 200
CODECS = ["auto", "channels", "zeros"]
MICRO_BATCHES = 3


def loss_fn(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out.float(), labels)


def relu_layers() -> list[LayerSpec]:
    hidden = [
        *(LayerSpec(nn.Linear, 2 * WIDTH, 2 * WIDTH), LayerSpec(nn.ReLU)),
        *(LayerSpec(nn.Linear, 2 * WIDTH, 2 * WIDTH), LayerSpec(nn.ReLU)),
    ]
    first = [LayerSpec(nn.Linear, WIDTH, 2 * WIDTH), LayerSpec(nn.ReLU)]
    return [*first, *hidden, LayerSpec(nn.Linear, 2 * WIDTH, CLASSES)]


class Several(nn.Module):
    """Passes on a float, an integer and a bool tensor, and uses each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Any) -> Any:
        x, number, flag = given if isinstance(given, tuple) else (given, *self.start(given))
        return torch.relu(self.linear(x * number.clamp(-2, 2)) * flag), number + 1, ~flag

    def start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 5).long(), x > 0


class Last(nn.Linear):
    def forward(self, given: Any) -> Tensor:
        return super().forward(given[0] + given[1] * given[2])


def several_layers() -> list[LayerSpec]:
    return [*(LayerSpec(Several) for _ in range(4)), LayerSpec(Last, WIDTH, CLASSES)]


def saved_masks(layers: list[LayerSpec]) -> str:
    """Of the whole pipeline, with whole rows and columns pruned; the same on all ranks."""
    generator = torch.Generator().manual_seed(3)
    masks = {}
    for number, layer in enumerate(layers):
        if layer.typename is nn.Linear:
            inputs, outputs = layer.module_args
            mask = torch.rand(outputs, inputs, generator=generator) < 0.5
            mask[:, torch.rand(inputs, generator=generator) < 0.3] = False
            masks[f"{number}.weight"] = mask
    path = shared_folder() / "masks.safetensors"
    on_first(lambda: sparse_comm.save_masks(masks, path))
    return str(path)


def engine_of(layers: list[LayerSpec], config: Config, **options: Any) -> Any:
    torch.manual_seed(0)
    model = PipelineModule(
        layers=layers, num_stages=dist.get_world_size(), loss_fn=loss_fn, **options
    )
    changed = merged(BASE, {"gradient_accumulation_steps": MICRO_BATCHES}, config)
    engine, *_ = initialize(model=model, config=changed, model_parameters=list(model.parameters()))
    return engine


def train(engine: Any, steps: int = 6, sizes: tuple[int, ...] = (WIDTH,)) -> list[float]:
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32

    def batches() -> Any:
        for seed in range(1000):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(BATCH, sizes[seed % len(sizes)], generator=generator)
            yield x.to(dtype), x[:, :CLASSES].argmax(1)

    data = batches()
    return [float(engine.train_batch(data)) for _ in range(steps)]


def weights(engine: Any) -> dict[str, Tensor]:
    return sparse_comm.dense_state_dict(engine.module)


def same_training(layers: Any, config: Config, steps: int = 6, **options: Any) -> None:
    plain = engine_of(layers(), merged(config, {"sparse_comm": {"pipeline_codec": "dense"}}))
    losses = train(plain, steps)
    for codec in CODECS:
        packed = engine_of(layers(), merged(config, {"sparse_comm": {"pipeline_codec": codec}}))
        kept = [c.density for c in packed._sparse_comm_sends.ends.channels if c is not None]
        assert bool(kept) == (codec != "zeros")
        assert all(density < 0.8 for density in kept)
        assert train(packed, steps) == losses, codec
        for (name, a), b in zip(weights(plain).items(), weights(packed).values(), strict=True):
            assert torch.equal(a, b), name
        packed.destroy()
    plain.destroy()


def with_masks(layers: list[LayerSpec]) -> Config:
    return block(saved_masks(layers), weights="cached")


@case(CASES)
def fifty_steps_in_every_codec(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    same_training(relu_layers, with_masks(relu_layers()), steps=50)


@case(CASES)
@on_two
def in_bf16_and_with_zero_1(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    same_training(relu_layers, merged(with_masks(relu_layers()), config))


def packed_by_hand(layers: Any, codec: str, **options: Any) -> Any:
    engine = engine_of(layers(), {}, **options)
    return engine if codec == "dense" else pack_sends(engine, codec)


@case(CASES)
def several_tensors_of_dense_stages_pass(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    losses = [train(packed_by_hand(several_layers, codec)) for codec in ("dense", *CODECS)]
    assert losses == losses[:1] * 4


class Sliced(nn.Linear):
    """Takes inputs of any length."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.weight[:, : x.shape[1]])).repeat(1, 2)


@case(CASES)
@on_two
def shapes_may_change(rank: int, world_size: int) -> None:
    """With zeros left out without DeepSpeed's dynamic_shape: messages say what they hold."""

    def layers() -> list[LayerSpec]:
        return [
            *(LayerSpec(Shorter, skip) for skip in (1, 1, 1)),
            LayerSpec(Sliced, 4 * WIDTH, CLASSES),
        ]

    deepspeed.init_distributed()
    widths = (20, 40, 30)
    plain = engine_of(layers(), {}, dynamic_shape=True)
    expected = train(plain, sizes=widths)
    for codec, options in (("auto", {"dynamic_shape": True}), ("zeros", {})):
        assert train(packed_by_hand(layers, codec, **options), sizes=widths) == expected


class Shorter(nn.Module):
    """Leaves out some columns, with a weight to train."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.skip = skip
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x[:, self.skip :] * self.scale)


@case(CASES)
@on_two
def checkpointed_stages(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    losses = [
        train(packed_by_hand(relu_layers, codec, activation_checkpoint_interval=1))
        for codec in ("dense", "zeros")
    ]
    assert losses[0] == losses[1]


@case(CASES)
@on_two
def evaluation_between_steps(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    found = []
    for codec in ("dense", "zeros"):
        engine = packed_by_hand(relu_layers, codec)
        losses = train(engine, 2)
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(5))
        data = ((x, x[:, :CLASSES].argmax(1)) for _ in range(100))
        losses += [float(engine.eval_batch(data)) for _ in range(2)]
        found.append(losses + train(engine, 2))
    assert found[0] == found[1]


class Block(nn.Sequential):
    """Ends in a ReLU, wherever it is cut."""

    def __init__(self, inputs: int) -> None:
        super().__init__(nn.Linear(inputs, 1000), nn.ReLU())


@case(CASES)
@on_two
def fewer_bytes_are_sent(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()

    def wide() -> list[LayerSpec]:
        return [LayerSpec(Block, n) for n in (WIDTH, 1000, 1000)]

    engine = pack_sends(engine_of(wide(), {}, partition_method="uniform"), "zeros")
    train(engine, 2)
    ends = engine._sparse_comm_sends.ends
    for boundary in (ends.before, ends.behind):
        if boundary is not None:
            sent, received = boundary.take_traffic()
            for traffic in (sent, received):
                assert traffic.messages == 2 * MICRO_BATCHES
                assert traffic.sent < 0.65 * traffic.dense


@case(CASES)
def bad_input_is_refused_on_all_ranks(rank: int, world_size: int) -> None:
    deepspeed.init_distributed()
    engine = engine_of(relu_layers(), {})
    with pytest.raises(ValueError, match="one of 'auto', 'channels', 'dense', 'zeros', got 'lz4'"):
        pack_sends(engine, "lz4")
    with pytest.raises(ValueError, match="the boundary between stages 0 and 1: stage 0 has pipe"):
        pack_sends(engine, "auto" if rank == 0 else "zeros")
    config = with_masks(relu_layers())
    with pytest.raises(ValueError, match="'pipeline_codec' must be one of"):
        engine_of(relu_layers(), merged(config, {"sparse_comm": {"pipeline_codec": "none"}}))
    name = "zeros" if rank == 0 else "channels"
    with pytest.raises(ValueError, match="the blocks 'sparse_comm' of the ranks' configs differ"):
        engine_of(relu_layers(), merged(config, {"sparse_comm": {"pipeline_codec": name}}))
    with pytest.raises(TypeError, match="are those of a PipelineEngine"):
        pack_sends(nn.Linear(3, 3))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_pipelines(name: str, world_size: int) -> None:
    passed(__name__, world_size, name)
