"""What is saved comes back, compact or dense, in every ZeRO stage; other masks are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from sparse_comm.integrations import deepspeed as sparse_deepspeed
from sparse_comm.integrations.deepspeed.checkpoint import _arguments
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import same_nnz_masks, same_state
from tests.integrations.cases import Case, Cases, case, passed
from tests.launch import run, shared_folder

from .training import (
    BASE,
    CLASSES,
    WIDTH,
    Config,
    block,
    dense_weights,
    mask_gradients,
    merged,
    on_first,
    pruned,
    start,
    train,
    zero,
)

TIMEOUT = 300
BF16 = {"bf16": {"enabled": True}}
STAGES = (0, 1, 2, 3)
CASES: Cases = {}


def configs() -> list[tuple[str, Config]]:
    return [
        (f"ZeRO {stage} {name}", merged(BASE, zero(stage), extra))
        for stage in STAGES
        for name, extra in (("fp32", {}), ("bf16", BF16))
    ]


def each(function: Callable[[Config], None]) -> Callable[[Config], None]:
    """Register a case for each stage and dtype."""
    for name, config in configs():
        CASES[f"{function.__name__.replace('_', ' ')}, {name}"] = _with(function, config)
    return function


def _with(function: Callable[[Config], None], config: Config) -> Case:
    return lambda rank, world_size: function(copy.deepcopy(config))


class Net(nn.Module):
    """With what an optimizer does not hold: a frozen layer, and a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(WIDTH, 64).requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.middle = nn.Linear(64, 64)
        self.last = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = self.frozen(x) + 0.01 * self.calls.to(x.dtype)
        return self.last(torch.tanh(self.middle(x)))


def engine(config: Config, is_compact: bool, other_start: bool = False, **more: Any) -> Any:
    """Of the same model and masks each time; ``other_start``: of other weights, pruned alike."""
    model, masks = pruned(Net)
    if other_start:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    if is_compact:
        return start(model, merged(config, block(weights="transient"), more))
    return start(mask_gradients(model, masks), merged(config, more))


def saved(config: Config, is_compact: bool) -> tuple[Path, list[float]]:
    """The folder of a checkpoint after three steps, and the losses of three more."""
    folder = shared_folder()
    trained = engine(config, is_compact)
    train(trained, 3)
    trained.save_checkpoint(str(folder))
    return folder, train(trained, 3, first=3)


@each
def a_compact_engine_goes_on_where_it_was(config: Config) -> None:
    folder, expected = saved(config, is_compact=True)
    resumed = engine(config, is_compact=True, other_start=True)
    path, _ = resumed.load_checkpoint(str(folder))
    assert path is not None
    assert resumed.global_steps == 3
    assert train(resumed, 3, first=3) == expected


@each
def a_dense_checkpoint_loads_into_a_compact_engine(config: Config) -> None:
    folder, expected = saved(config, is_compact=False)
    resumed = engine(config, is_compact=True, other_start=True)
    assert resumed.load_checkpoint(str(folder))[0] is not None
    assert resumed.global_steps == 3
    assert train(resumed, 3, first=3) == expected
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


@each
def weights_alone_load_from_a_dense_checkpoint(config: Config) -> None:
    folder, _ = saved(config, is_compact=False)
    resumed = engine(config, is_compact=True, other_start=True)
    resumed.load_checkpoint(str(folder), load_optimizer_states=False)
    twin = engine(config, is_compact=False, other_start=True)
    twin.load_checkpoint(str(folder), load_optimizer_states=False)
    assert train(resumed, 3, first=3) == train(twin, 3, first=3)


@each
def a_compact_checkpoint_becomes_a_dense_one(config: Config) -> None:
    if config["zero_optimization"]["stage"] == 0:
        return  # which has no universal checkpoints
    folder, expected = saved(config, is_compact=True)
    target = shared_folder()
    on_first(lambda: sparse_deepspeed.expand_checkpoint(folder, target))
    # DeepSpeed's universal checkpoints hold neither buffers nor frozen parameters
    plain = engine(config, is_compact=False, checkpoint={"load_universal": True})
    _copy_what_is_not_trained(plain, folder)
    plain.load_checkpoint(str(target))
    assert train(plain, 3, first=3) == expected


@each
def another_number_of_ranks_loads_a_packed_checkpoint(config: Config) -> None:
    """Of a compact one, and of the dense one that it is expanded to: here by two ranks again."""
    if config["zero_optimization"]["stage"] == 0:
        return
    folder, expected = saved(config, is_compact=True)
    packed, expanded, again = shared_folder(), shared_folder(), shared_folder()
    masks = _masks_file()

    def write() -> None:
        sparse_deepspeed.pack_checkpoint(folder, packed)
        sparse_deepspeed.expand_checkpoint(folder, expanded)
        sparse_deepspeed.pack_checkpoint(expanded, again, masks)

    on_first(write)
    for target in (packed, again):
        resumed = engine(config, is_compact=True, checkpoint={"load_universal": True})
        resumed.module.calls.fill_(3)  # a buffer, as below
        resumed.load_checkpoint(str(target))
        assert train(resumed, 3, first=3) == expected
        refusing = engine(config, is_compact=True)
        with pytest.raises(ValueError, match="is a universal checkpoint: start the engine with"):
            refusing.load_checkpoint(str(target))
    refusing = engine(config, is_compact=True, checkpoint={"load_universal": True})
    with pytest.raises(ValueError, match="is a dense universal checkpoint: make it compact with"):
        refusing.load_checkpoint(str(expanded))
    on_first(lambda: (packed / "global_step3" / "masks.safetensors").unlink())
    with pytest.raises(ValueError, match="but not the masks that go with them"):
        refusing.load_checkpoint(str(packed))


def _copy_what_is_not_trained(plain: Any, folder: Path) -> None:
    state = sparse_deepspeed.dense_state_dict_of(folder)
    frozen = [p for p in plain.module.parameters() if not p.requires_grad and hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0, enabled=bool(frozen)):
        for name, tensor in (*plain.module.named_buffers(), *plain.module.named_parameters()):
            if not tensor.requires_grad:
                tensor.data.copy_(state[name])


@each
def consolidated_it_is_a_plain_dense_state_dict(config: Config) -> None:
    folder, _ = saved(config, is_compact=True)
    state = sparse_deepspeed.dense_state_dict_of(folder)
    model, masks = pruned(Net)
    model.load_state_dict(state)
    for name, mask in masks.items():
        assert not state[name][~mask].any()
        assert state[name][mask].any()


@each
def the_16_bit_model_is_dense(config: Config) -> None:
    config = merged(
        config, {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}
    )
    trained = engine(config, is_compact=True)
    train(trained, 2)
    folder = shared_folder()
    if config["zero_optimization"]["stage"] == 3:
        key = "stage3_gather_16bit_weights_on_model_save"
        without = engine(merged(config, {"zero_optimization": {key: False}}), is_compact=True)
        with pytest.warns(UserWarning, match=f"wrote nothing: .*'{key}': true"):
            assert not without.save_16bit_model(str(folder), "model.bin")
    assert trained.save_16bit_model(str(folder), "model.bin")
    dist.barrier()
    state = torch.load(folder / "model.bin", weights_only=True)
    model, masks = pruned(Net)
    assert list(state) == list(model.state_dict())
    model.load_state_dict(state)
    for name, mask in masks.items():
        assert not state[name][~mask].any()


@each
def other_masks_are_refused_on_every_rank(config: Config) -> None:
    folder, _ = saved(config, is_compact=True)
    model, masks = pruned(Net)
    other = shared_folder() / "other.safetensors"
    on_first(lambda: sparse_comm.save_masks(same_nnz_masks(masks), other))
    foreign = start(model, merged(config, block(str(other))))
    before = dense_weights(foreign)
    with pytest.raises(ValueError, match=r"has another mask for .frozen.weight. than"):
        foreign.load_checkpoint(str(folder))
    assert same_state(dense_weights(foreign), before)  # nothing was loaded


@case(CASES)
def a_checkpoint_that_does_not_exist_is_deepspeeds_to_complain_of(rank: int, world: int) -> None:
    trained = engine(merged(BASE, zero(1)), is_compact=True)
    assert trained.load_checkpoint(str(shared_folder())) == (None, None)


class Tied(nn.Module):
    """Two layers of one weight, which has one mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, CLASSES)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) + self.embed(x)


@case(CASES)
def consolidated_tied_weights_are_dense(rank: int, world_size: int) -> None:
    for stage in STAGES:
        model, _ = pruned(Tied)
        trained, folder = start(model, merged(BASE, zero(stage), block())), shared_folder()
        train(trained, 2)
        trained.save_checkpoint(str(folder))
        state = sparse_deepspeed.dense_state_dict_of(folder)
        plain = pruned(Tied)[0]
        plain.load_state_dict(state)
        assert same_state(dict(plain.named_parameters()), _by_name(dense_weights(trained), plain))


def _by_name(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: state[name] for name, _ in model.named_parameters()}


@case(CASES)
def a_mask_may_go_by_any_name_of_a_tied_parameter(rank: int, world_size: int) -> None:
    model, masks = pruned(Tied)
    path = shared_folder() / "masks.safetensors"
    on_first(lambda: sparse_comm.save_masks({"out.weight": masks["embed.weight"]}, path))
    engine = start(model, merged(BASE, zero(1), block(str(path))))
    assert train(engine) == train(start(pruned(Tied)[0], merged(BASE, zero(1), block())))
    other = same_nnz_masks(masks)["embed.weight"]
    both = {"out.weight": other, "embed.weight": masks["embed.weight"]}
    on_first(lambda: sparse_comm.save_masks(both, path))
    with pytest.raises(ValueError, match=r"'out\.weight' is tied to 'embed\.weight', but their"):
        start(pruned(Tied)[0], merged(BASE, zero(1), block(str(path))))


@case(CASES)
def what_cannot_be_loaded_is_refused_before_anything_is(rank: int, world_size: int) -> None:
    adagrad = {"optimizer": {"type": "Adagrad", "params": {"torch_adam": None}}}
    for stage in (1, 3):
        config = merged(BASE, zero(stage))
        dense, _ = saved(merged(config, adagrad), is_compact=False)
        fresh = engine(merged(config, adagrad), is_compact=True, other_start=True)
        before = dense_weights(fresh)
        with pytest.raises(ValueError, match="only the state of Adam and AdamW can be packed"):
            fresh.load_checkpoint(str(dense))
        assert same_state(dense_weights(fresh), before)
        compact, _ = saved(config, is_compact=True)
        on_first(lambda at=compact: (at / "global_step3" / "masks.safetensors").unlink())
        fresh = engine(config, is_compact=True, other_start=True)
        with pytest.raises(ValueError, match="but not the masks that go with them"):
            fresh.load_checkpoint(str(compact))
        assert same_state(dense_weights(fresh), before)
    dense, _ = saved(merged(BASE, zero(1)), is_compact=False)
    target = shared_folder()
    on_first(lambda: _universal(dense, target))
    fresh = engine(merged(BASE, zero(1)), is_compact=True, checkpoint={"load_universal": True})
    with pytest.raises(ValueError, match="make it compact with pack_checkpoint"):
        fresh.load_checkpoint(str(target))
    with pytest.raises(ValueError, match="or the checkpoint is compact"):
        sparse_deepspeed.pack_checkpoint(compact, shared_folder(), _masks_file())


def _universal(source: Path, target: Path) -> None:
    arguments = _arguments(source / "global_step3", target / "global_step3")
    ds_to_universal(arguments)


def _masks_file() -> Path:
    path = shared_folder() / "masks.safetensors"
    on_first(lambda: sparse_comm.save_masks(pruned(Net)[1], path))
    return path


@case(CASES)
def packing_says_what_is_wrong(rank: int, world_size: int) -> None:
    folder, _ = saved(merged(BASE, zero(1)), is_compact=True)
    dense, _ = saved(merged(BASE, zero(1)), is_compact=False)
    stage0, _ = saved(merged(BASE, zero(0)), is_compact=False)
    masks = folder / "global_step3" / "masks.safetensors"
    if rank > 0:
        return
    target = folder / "new"
    with pytest.raises(ValueError, match=r"is compact and has its own masks.*: give no masks, or"):
        sparse_deepspeed.pack_checkpoint(folder, target, masks)
    with pytest.raises(ValueError, match="is a dense checkpoint: give the masks, a file of"):
        sparse_deepspeed.pack_checkpoint(dense, target)
    with pytest.raises(FileNotFoundError, match="is not a compact checkpoint"):
        sparse_deepspeed.expand_checkpoint(dense, target)
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*global_step9"):
        sparse_deepspeed.pack_checkpoint(dense, target, masks, tag="global_step9")
    with pytest.raises(FileNotFoundError, match="has no file 'latest'"):
        sparse_deepspeed.pack_checkpoint(target, target, masks)
    with pytest.raises(ValueError, match="is a checkpoint of ZeRO 0"):
        sparse_deepspeed.pack_checkpoint(stage0, target, masks)
    foreign = folder / "foreign.safetensors"
    sparse_comm.save_masks({"head": torch.ones(3, dtype=torch.bool)}, foreign)
    with pytest.raises(ValueError, match="the masks have 'head', the checkpoint has not"):
        sparse_deepspeed.pack_checkpoint(dense, target, foreign)
    sparse_comm.save_masks({"last.weight": torch.ones(3, dtype=torch.bool)}, foreign)
    with pytest.raises(ValueError, match=r"'last.weight' has 1024 entries in the checkpoint"):
        sparse_deepspeed.pack_checkpoint(dense, target, foreign)
    assert not any(target.rglob("*"))  # nor drafts
    sparse_deepspeed.pack_checkpoint(dense, target, masks)
    with pytest.raises(FileExistsError, match="remove it, or choose another target"):
        sparse_deepspeed.pack_checkpoint(dense, target, masks)


def _states(trained: Any) -> dict[str, Tensor | None]:
    """Masters and moments, whole. A collective under ZeRO 3."""
    held = {}
    for name, parameter in trained.module.named_parameters():
        if parameter.requires_grad:
            held[f"{name} fp32"] = safe_get_full_fp32_param(parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                held[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key)
    return held


def _save(rank: int, world_size: int, folder: str) -> None:
    for stage in (1, 2, 3):
        at = Path(folder) / str(stage)
        trained = engine(merged(BASE, zero(stage)), is_compact=True)
        train(trained, 3)
        trained.save_checkpoint(str(at / "saved"))
        on_first(lambda at=at: sparse_deepspeed.pack_checkpoint(at / "saved", at / "packed"))
        states = _states(trained)
        on_first(lambda at=at, states=states: torch.save(states, at / "states.pt"))


def _resume_alone(rank: int, world_size: int, folder: str) -> None:
    for stage in (1, 2, 3):
        at = Path(folder) / str(stage)
        universal = {"load_universal": True}
        resumed = engine(merged(BASE, zero(stage)), is_compact=True, checkpoint=universal)
        resumed.load_checkpoint(str(at / "packed"))
        assert resumed.global_steps == 3
        dense = sparse_deepspeed.dense_state_dict_of(at / "saved")
        trained = {k: v for k, v in dense_weights(resumed).items() if not k.startswith("frozen")}
        assert same_state(trained, {name: dense[name] for name in trained})
        states = _states(resumed)
        assert len(states) == 12  # of two layers
        assert same_state(states, torch.load(at / "states.pt"))


def test_one_rank_goes_on_where_two_were(tmp_path):
    run(_save, 2, str(tmp_path))
    run(_resume_alone, 1, str(tmp_path))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", CASES)
def test_checkpoints(name):
    passed(__name__, 2, name)
