"""What does not work is refused on every rank, before an engine exists; the model stays dense."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("deepspeed")

import deepspeed
import torch
from sparse_comm.integrations import deepspeed as sparse_deepspeed
from sparse_comm.integrations.deepspeed import refuse
from torch import nn
from torch.nn.utils import prune

import sparse_comm
from tests.compact.models import everything, same_nnz_masks, same_state
from tests.integrations.cases import Cases, case, passed
from tests.launch import RankError, outcomes, shared_folder

from .training import (
    BASE,
    Config,
    block,
    merged,
    mlp,
    on_first,
    pruned,
    start,
    train,
    zero,
)

CASES: Cases = {}
CONFIG = merged(BASE, zero(1))


def refused(
    config: Config,
    said: str,
    error: type[Exception] = ValueError,
    model: nn.Module | None = None,
    **arguments: Any,
) -> None:
    """On this rank, and without a trace."""
    model = pruned()[0] if model is None else model
    before = everything(model)
    with pytest.raises(error, match=said):
        start(model, config, **arguments)
    assert everything(model) == before


# ---------------------------------------------------------------- masks


@case(CASES)
def a_file_that_is_missing(rank: int, world_size: int) -> None:
    said = r"file 'gone.safetensors', which does not exist \(.*save_masks\(masks, path\) writes one"
    refused(merged(CONFIG, block("gone.safetensors")), said, FileNotFoundError)


@case(CASES)
def a_file_that_is_missing_on_one_rank(rank: int, world_size: int) -> None:
    folder = shared_folder()
    on_first(lambda: sparse_comm.save_masks(pruned()[1], folder / "0.safetensors"))
    config = merged(CONFIG, block(str(folder / f"{rank}.safetensors")))
    if rank == 1:
        refused(config, "which does not exist", FileNotFoundError)
    else:
        refused(config, "rank 1 failed: FileNotFoundError: .*does not exist", RuntimeError)


@case(CASES)
def a_word_that_is_nearly_one_of_ours(rank: int, world_size: int) -> None:
    said = r"file 'from_zero', .* did you mean 'from_zeros'\?"
    refused(merged(CONFIG, block("from_zero")), said, FileNotFoundError)


@case(CASES)
def masks_of_another_model(rank: int, world_size: int) -> None:
    path = shared_folder() / "masks.safetensors"
    config = merged(CONFIG, block(str(path)))
    masks = pruned()[1]
    for given, said in (
        ({"0.wieght": masks["0.weight"]}, r"no parameter of that name; did you mean '0.weight'\?"),
        ({"0.weight": masks["2.weight"]}, r"'0.weight' has shape \(64, 64\), the parameter \(64, "),
    ):
        on_first(lambda given=given: sparse_comm.save_masks(given, path))
        refused(config, rf"the masks of '.*masks\.safetensors' do not fit the model, .*{said}")
    on_first(lambda: path.write_text("nothing of the kind"))
    refused(config, "is cut short or damaged|not a safetensors file")


@case(CASES)
def masks_that_depend_on_the_rank(rank: int, world_size: int) -> None:
    folder = shared_folder()
    model, masks = pruned()
    other = same_nnz_masks(masks)
    mine = folder / f"{rank}.safetensors"
    sparse_comm.save_masks(other if rank else masks, mine)
    said = (
        "masks differ between ranks: '0.weight' is masked differently on rank 1 than on rank 0.*"
        f"copy the file '.*{mine.name}' of one machine to the others"
    )
    refused(merged(CONFIG, block(str(mine))), said)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if rank and name == "2.weight":
                parameter.copy_(torch.where(other[name], 1.0, 0.0))
    said = (
        "masks differ between ranks: '2.weight' is masked differently on rank 1 than on rank 0.*"
        "prune the same entries on each, or save the masks"
    )
    refused(merged(CONFIG, block("from_zeros")), said, model=model)


@case(CASES)
def pruning_that_depends_on_the_rank(rank: int, world_size: int) -> None:
    model = mlp()
    generator = torch.Generator().manual_seed(rank)
    mask = torch.rand(model[0].weight.shape, generator=generator) < 0.5
    prune.custom_from_mask(model[0], "weight", mask)
    with pytest.raises(ValueError, match=r"masks differ between ranks: '0\.weight'"):
        start(model, merged(CONFIG, block("from_torch_prune")))


@case(CASES)
def what_one_rank_alone_cannot_do(rank: int, world_size: int) -> None:
    """The other does not wait for it."""
    error, said = (ValueError, "unknown key 'mask'") if rank else (RuntimeError, "rank 1 failed: ")
    wrong = {"sparse_comm": {"mask": "x"}} if rank else block()
    refused(merged(CONFIG, wrong), said, error)
    refused(
        merged(CONFIG, block(**({"weights": "transient"} if rank else {}))),
        r"ranks' configs differ \(rank 0: 'weights': None, 'pipeline_codec': 'auto'; rank 1: "
        r"'weights': 'transient', 'pipeline_codec': 'auto'\)",
    )
    model, masks = pruned()
    path = shared_folder() / "masks.safetensors"
    on_first(lambda: sparse_comm.save_masks(masks, path))
    if rank:
        nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Identity())
    error, said = (ValueError, "parametrization") if rank else (RuntimeError, "rank 1 failed: ")
    with pytest.raises(error, match=said):
        start(model, merged(CONFIG, block(str(path))), model_parameters=None)
    assert not sparse_comm.is_compact(model)
    model = mlp()
    if rank:
        prune.l1_unstructured(model[0], "weight", 0.5)
        error, said = ValueError, "pruned through torch.nn.utils.prune"
    with pytest.raises(error, match=said):
        start(model, merged(CONFIG, block("from_zeros")), model_parameters=None)


@case(CASES)
def masks_that_mask_nothing(rank: int, world_size: int) -> None:
    with pytest.warns(UserWarning, match="there are no masks"):
        refused(
            merged(CONFIG, block("from_zeros")), r"its masks \('from_zeros'\) mask no", model=mlp()
        )


@case(CASES)
def masks_of_a_library_that_is_gone(rank: int, world_size: int) -> None:
    refused(merged(CONFIG, block("from_deepspeed_compression")), "has its masks in its zeros")


# ---------------------------------------------------------------- configs

REFUSED: dict[str, tuple[Config, str]] = {
    "sparse gradients": ({"sparse_gradients": True}, "'sparse_gradients' .* is True"),
    "deepspeed.compression": ({"compression_training": {"x": 1}}, "masks come from 'masks'"),
    "the hybrid engine": ({"hybrid_engine": {"enabled": True}}, "inference kernels"),
    "DeepCompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile"),
    "AutoTP": ({"tensor_parallel": {"autotp_size": 2}}, "AutoTP cuts dense weights"),
    "AutoEP": ({"expert_parallel": {"enabled": True}}, "AutoEP stacks dense experts"),
    "ZenFlow": ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "columns of dense"),
    "quantised gradients": (zero(3, zero_quantized_gradients=True), "not tested"),
    "quantised weights": (zero(3, zero_quantized_weights=True), "not tested"),
    "hierarchical partitions": (zero(3, zero_hpz_partition_size=2), "not tested"),
    "SuperOffload": (
        zero(3, offload_optimizer={"device": "cpu", "super_offload": True}),
        "not tested",
    ),
    "NVMe": (zero(3, offload_optimizer={"device": "nvme"}), "'nvme': .* use 'cpu'"),
}
for _name, (_config, _said) in REFUSED.items():
    CASES[f"config: {_name}"] = lambda rank, world_size, config=_config, said=_said: refused(
        merged(CONFIG, config, block()), said
    )


@case(CASES)
def optimizers_that_compress_themselves(rank: int, world_size: int) -> None:
    for name in ("OneBitAdam", "onebit_lamb", "ZeroOneAdam"):
        config = merged(CONFIG, {"optimizer": {"type": name}}, block())
        refused(config, f"optimizer {name} compresses gradients itself")


@case(CASES)
def what_deepspeed_refuses_leaves_a_dense_model(rank: int, world_size: int) -> None:
    model, _ = pruned()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for changes, said in (
        ({"optimizer": {"type": "Adamm"}}, "not a supported DeepSpeed Optimizer"),
        ({"train_batch_size": 7}, "accumulation steps"),
    ):
        with pytest.raises(AssertionError, match=said):
            start(model, merged(CONFIG, changes, block()))
        assert not sparse_comm.is_compact(model)
        assert same_state(dict(model.named_parameters()), before)
    assert train(start(model, merged(CONFIG, block()))) == train(
        start(pruned()[0], merged(CONFIG, block()))
    )


@case(CASES)
def optimizers_that_need_matrices(rank: int, world_size: int) -> None:
    for name in ("Muon", "muon", "Adafactor"):
        config = merged(CONFIG, {"optimizer": {"type": name}}, block())
        refused(config, "works on matrices, and compact values are 1-D", TypeError)
    model, _ = pruned()
    config = merged(CONFIG, {"optimizer": None}, block())
    client = torch.optim.Adafactor(model.parameters())
    refused(config, "Adafactor works on matrices", TypeError, model, optimizer=client)
    refused(config, "Adafactor works on", TypeError, model, optimizer=torch.optim.Adafactor)


@case(CASES)
def parameters_that_would_train_nothing(rank: int, world_size: int) -> None:
    """Of the model as it was before an attempt that DeepSpeed refused."""
    model, _ = pruned()
    before = list(model.parameters())
    with pytest.raises(AssertionError):
        start(model, merged(CONFIG, {"optimizer": {"type": "Adamm"}}, block()))
    said = "is to train the parameter '0.weight' as it was before sparse_comm replaced it"
    for given in (before, [{"params": before}], list(zip("abcdefgh", before, strict=True))):
        with pytest.raises(ValueError, match=said):
            start(model, merged(CONFIG, block()), model_parameters=given)
        assert not sparse_comm.is_compact(model)
    for make, error, why in (
        (lambda parameters: torch.optim.AdamW(before), ValueError, said),
        (functools.partial(torch.optim.Adafactor), TypeError, "Adafactor works on matrices"),
    ):
        with pytest.raises(error, match=why):
            start(model, merged(CONFIG, {"optimizer": None}, block()), optimizer=make)
        assert not sparse_comm.is_compact(model)


@case(CASES)
def parameters_in_all_the_forms_that_optimizers_take(rank: int, world_size: int) -> None:
    expected = train(start(pruned()[0], merged(CONFIG, block())))
    for form in (
        lambda model: model.parameters(),
        lambda model: (p for p in model.parameters()),
        lambda model: [{"params": p} for p in model.parameters()],
        lambda model: [{"params": model.parameters()}],
    ):
        model, _ = pruned()
        engine = start(model, merged(CONFIG, block()), model_parameters=form(model))
        assert train(engine) == expected
    model, _ = pruned()
    named = start(
        model, merged(BASE, zero(0), block()), model_parameters=list(model.named_parameters())
    )
    model, _ = pruned()
    assert train(named) == train(start(model, merged(BASE, zero(0), block())))


@case(CASES)
def a_deepspeed_that_is_not_tested(rank: int, world_size: int) -> None:
    for version in ("0.18.9", "0.20.0", "1.0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(refuse.metadata, "version", lambda package, version=version: version)
            said = f"DeepSpeed {re.escape(version)} is outside the range .*pip install"
            refused(merged(CONFIG, block()), said, RuntimeError)


@case(CASES)
def a_model_that_is_compact_already(rank: int, world_size: int) -> None:
    model = sparse_comm.compact(*pruned())
    with pytest.raises(ValueError, match="compact already: give it to deepspeed"):
        start(model, merged(CONFIG, block()))
    engine = deepspeed.initialize(
        model=model, config=merged(CONFIG), model_parameters=model.parameters()
    )[0]
    assert sparse_deepspeed.watch(engine) is engine
    assert sparse_deepspeed.watch(engine) is engine  # once more has no effect
    expected = train(start(pruned()[0], merged(CONFIG, block())))
    assert train(engine) == expected


@case(CASES)
def an_engine_whose_model_is_dense(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="the engine's model is not compact"):
        sparse_deepspeed.watch(start(mlp(), merged(CONFIG)))


@case(CASES)
def a_refusal_leaves_nothing_behind(rank: int, world_size: int) -> None:
    """The last case: the ranks still agree, and the same model trains."""
    model, _ = pruned()
    with pytest.raises(FileNotFoundError):
        start(model, merged(CONFIG, block("gone.safetensors")))
    losses = train(start(model, merged(CONFIG, block())))
    assert losses == train(start(pruned()[0], merged(CONFIG, block())))


@pytest.mark.parametrize("name", CASES)
def test_refused_on_every_rank(name):
    passed(__name__, 2, name)


# ---------------------------------------------------------------- a compiler that fails


def _without_a_compiler(rank: int, world_size: int) -> None:
    """In a process of its own: kernels that were loaded once stay."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(shared_folder())
    os.environ["CXX"] = "false"
    for name, extra in (
        ("FusedAdam", {}),
        ("CPUAdam", {"cpu_offload": True}),  # as older configs say it
    ):
        config = merged(CONFIG, block(), {"zero_optimization": extra})
        train(start(pruned()[0], config))  # torch's needs none
        config["optimizer"]["params"].pop("torch_adam")
        refused(config, f"kernel of DeepSpeed's {name} cannot be built here: .*torch_adam")


def test_an_optimizer_whose_kernel_cannot_be_built_is_refused():
    (outcome,) = outcomes(_without_a_compiler, 1)
    assert outcome.error is None, outcome.traceback


# ---------------------------------------------------------------- a rank that dies


def _die_in_the_third_step(rank: int, world_size: int, stage: int) -> None:
    engine = start(pruned()[0], merged(BASE, zero(stage), block()))
    train(engine, 2)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(engine, 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_when_a_rank_is_killed_the_other_ends_with_an_error(stage):
    first, second = outcomes(_die_in_the_third_step, 2, stage, timeout=60)
    assert isinstance(second.error, RankError)
    assert "exit code -9" in str(second.error)
    assert isinstance(first.error, Exception)
    assert not isinstance(first.error, RankError), "it hung until it was killed"


def _untouched(rank: int, world_size: int) -> None:
    off: list[Callable[[], Config]] = [
        lambda: merged(CONFIG),
        lambda: merged(CONFIG, {"sparse_comm": {"enabled": False, "masks": "gone"}}),
    ]
    plain = deepspeed.initialize(
        model=(model := pruned()[0]), config=off[0](), model_parameters=model.parameters()
    )
    expected = train(plain[0])
    for config in off:
        model = pruned()[0]
        returned = sparse_deepspeed.initialize(
            model=model, config=config(), model_parameters=model.parameters()
        )
        assert [type(part) for part in returned] == [type(part) for part in plain]
        assert type(returned[0]) is deepspeed.DeepSpeedEngine
        assert returned[0].module is model
        assert not sparse_comm.is_compact(model)
        assert sparse_deepspeed.gradient_bytes(returned[0]) is None
        assert train(returned[0]) == expected


def test_without_the_block_or_with_it_off_it_is_deepspeed():
    outcome = outcomes(_untouched, 2)
    assert [o.error for o in outcome] == [None, None], outcome[0].traceback
