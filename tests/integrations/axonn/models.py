"""Models cut into stages, and one process that trains them whole, to compare engines with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from axonn import axonn as ax
from sparse_comm.integrations import axonn as sparse_axonn
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import Masks, random_masks, zero_pruned_

CLASSES = 7
TOKENS = 19
WIDTH = 33
BATCH = 8


class Block(nn.Module):
    """Two layers with a residual, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Mean(nn.Module):
    """Over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def whole_model() -> nn.Sequential:
    """Eight layers: an embedding, four blocks, a mean and a head."""
    torch.manual_seed(0)
    layers = [nn.Embedding(TOKENS, WIDTH), *(Block() for _ in range(4)), Mean()]
    return nn.Sequential(*layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))


class Stage(nn.Module):
    """Some consecutive layers of ``whole_model()``, with AxoNN's methods."""

    def __init__(self, whole: nn.Sequential, number: int, count: int) -> None:
        super().__init__()
        cuts = {1: [0, 8], 2: [0, 3, 8], 3: [0, 2, 4, 8], 4: [0, 1, 3, 4, 8]}[count]
        self.first = cuts[number]
        self.layers = nn.Sequential(*copy.deepcopy(whole)[cuts[number] : cuts[number + 1]])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def get_input_shape(self) -> list[int]:
        return [-1, 5, WIDTH]

    def get_output_shape(self) -> list[int]:
        return [-1, 5, WIDTH]

    def name(self, name: str) -> str:
        """In the whole model, of a parameter of the stage."""
        _, number, rest = name.split(".", 2)
        return f"{self.first + int(number)}.{rest}"


def batch(seed: int, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Tokens, and a class that follows from the largest, to be learnt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, TOKENS, (size, 5), generator=generator)
    return x, x.amax(1) % CLASSES


def adamw(model: nn.Module, masks: Masks | None = None) -> torch.optim.Optimizer:
    """For a dense model with masks: it trains what is unpruned only."""
    return _masked(torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True), model, masks)


def sgd(model: nn.Module, masks: Masks | None = None) -> torch.optim.Optimizer:
    """Which sees the size of gradients, to which AdamW is blind."""
    return _masked(torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), model, masks)


def _masked(
    optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks | None
) -> torch.optim.Optimizer:
    if masks:
        optimizer.register_step_pre_hook(lambda *_: zero_pruned_(model, masks, gradients=True))
        optimizer.register_step_post_hook(lambda *_: zero_pruned_(model, masks))
    return optimizer


def autocast(dtype: torch.dtype) -> Any:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype)


def train_whole(
    model: nn.Module,
    masks: Masks | None = None,
    micro_batches: int = 4,
    replicas: int = 1,
    steps: int = 50,
    dtype: torch.dtype = torch.float32,
    make: Callable[..., torch.optim.Optimizer] = adamw,
) -> list[float]:
    """One process on all replicas' batches: the mean loss of each step."""
    zero_pruned_(model, masks or {})
    optimizer = make(model, masks)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        of_replicas = []
        for replica in range(replicas):
            x, y = batch(1000 * replica + number)
            total = 0.0
            for part, labels in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
                with autocast(dtype):
                    out = model(part)
                loss = F.cross_entropy(out.float(), labels)
                (loss * (1 / micro_batches) / replicas).backward()
                total += loss.item()
            of_replicas.append(total / micro_batches)
        optimizer.step()
        losses.append(sum(of_replicas) / replicas)
    return losses


@contextlib.contextmanager
def grid(*args: int, **kwargs: Any) -> Iterator[None]:
    """Between ``init`` and ``shutdown``."""
    sparse_axonn.init(*args, **kwargs)
    try:
        yield
    finally:
        sparse_axonn.shutdown()


def this_stage(make: Callable[[], nn.Sequential] = whole_model, masks: Masks | None = None) -> Any:
    whole = make()
    zero_pruned_(whole, masks or {})
    return Stage(whole, ax.config.inter_layer_parallel_rank, ax.config.G_inter)


def engine_of(
    masks: Masks | None = None,
    micro_batches: int = 4,
    dtype: torch.dtype = torch.float32,
    stage: Any = None,
    **options: Any,
) -> sparse_axonn.InterLayerEngine:
    """An engine of this rank's stage, compact if there are masks; ``init`` was called."""
    stage = this_stage(masks=masks) if stage is None else stage
    if masks is not None:
        options = {"sparse": True, "masks": masks, **options}
    options = {"names": stage.name, "bucket_cap_mb": 0.005, **options}
    return sparse_axonn.InterLayerEngine(
        stage, F.cross_entropy, dtype, micro_batch_size=BATCH // micro_batches, **options
    )


def dense_engine_of(masks: Masks, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    """An engine of the masked dense stage, and an optimizer that keeps it so."""
    stage = this_stage(masks=masks)
    mine = {name: masks[stage.name(name)] for name, _ in stage.named_parameters()
            if stage.name(name) in masks}  # fmt: skip
    return engine_of(None, stage=stage, **options), adamw(stage, mine)


def train(
    engine: Any, optimizer: Any = None, steps: int = 50, first: int = 0, **kwargs: Any
) -> Any:
    """The mean loss of each step over the replicas, on every rank."""
    optimizer = optimizer or adamw(engine.model)
    losses = []
    for number in range(first, first + steps):
        optimizer.zero_grad()
        x, y = batch(1000 * ax.config.data_parallel_rank + number)
        losses.append(engine.forward_backward_optimizer(x, y, optimizer, **kwargs))
    return over_replicas(losses)


def over_replicas(losses: list[float]) -> list[float]:
    """What ranks of the last stage say, averaged; other stages say 0."""
    last = ax.config.inter_layer_parallel_rank == ax.config.G_inter - 1
    assert last or losses == [0.0] * len(losses)
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, losses if last else None)
    known = [own for own in said if own is not None]
    return [sum(step) / len(step) for step in zip(*known, strict=True)]


def masks_of_whole(density: float = 0.3) -> Masks:
    return random_masks(whole_model(), density)


def same_weights(whole: nn.Module, stage: Any) -> bool:
    """Whether the stage's dense weights are the whole model's, bit for bit."""
    expected, own = whole.state_dict(), sparse_comm.dense_state_dict(stage)
    return all(torch.equal(own[name], expected[stage.name(name)]) for name in own)


def close_weights(whole: nn.Module, stage: Any, tolerance: float = 1e-5) -> bool:
    """Whether they are, but for so much."""
    expected, own = whole.state_dict(), sparse_comm.dense_state_dict(stage)
    return all(
        torch.allclose(own[name], expected[stage.name(name)], rtol=0, atol=tolerance)
        for name in own
    )


def same_stages(a: Any, b: Any) -> bool:
    """Whether two stages, dense or compact, stand for the same bits."""
    one, other = sparse_comm.dense_state_dict(a), sparse_comm.dense_state_dict(b)
    return list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


class ReluStage(nn.Sequential):
    """One layer that ends in a ReLU; the last stage has a head."""

    def __init__(self, number: int, count: int) -> None:
        torch.manual_seed(number)
        layers: list[nn.Module] = [nn.Linear(2 * WIDTH, 2 * WIDTH), nn.ReLU()]
        if number == count - 1:
            layers.append(nn.Linear(2 * WIDTH, CLASSES))
        super().__init__(*layers)

    def get_input_shape(self) -> list[int]:
        return [-1, 2 * WIDTH]

    get_output_shape = get_input_shape


def relu_engine(
    codec: str, compact: bool = True, loss: Any = F.cross_entropy, **options: Any
) -> Any:
    """Of stages whose masks prune whole columns and, but for the last one, rows."""
    stage = ReluStage(ax.config.inter_layer_parallel_rank, ax.config.G_inter)
    masks = random_masks(stage, 0.6, seed=ax.config.inter_layer_parallel_rank)
    masks["0.weight"][:, ::5] = False
    if ax.config.inter_layer_parallel_rank < ax.config.G_inter - 1:
        masks["0.weight"][3::7] = False
        masks["0.bias"] = torch.ones(2 * WIDTH, dtype=torch.bool)
        masks["0.bias"][3::7] = False
    if compact:
        options |= {"sparse": True, "masks": masks}
    options = {"computation_dtype": torch.float32, "bucket_cap_mb": 0.005, **options}
    return sparse_axonn.InterLayerEngine(
        stage, loss, micro_batch_size=2, pipeline_codec=codec, **options
    )


def relu_batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, 2 * WIDTH, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


def train_relu(engine: Any, steps: int = 8, first: int = 0) -> list[float]:
    optimizer = adamw(engine.model)
    losses = []
    for number in range(first, first + steps):
        optimizer.zero_grad()
        x, y = relu_batch(1000 * ax.config.data_parallel_rank + number)
        losses.append(engine.forward_backward_optimizer(x, y, optimizer))
    return over_replicas(losses)
