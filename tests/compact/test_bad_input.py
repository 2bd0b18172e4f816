"""What cannot be done is refused with a reason, and the model is left exactly as it was.

Every message names the parameter (where there is one), says what was got and what was expected, and
what to do. (Refusals at an optimizer's step: ``test_optimizer.py``.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sparse_comm
from tests.compact.models import (
    Tied,
    everything,
    mlp,
    random_masks,
    same_nnz_masks,
    seeded,
    train,
)

Refused = tuple[nn.Module, torch.optim.Optimizer | None, Callable[[], Any]]
CASES: dict[str, tuple[Callable[[], Refused], type[Exception], tuple[str, ...]]] = {}


def refused(error: type[Exception], *parts: str) -> Callable[[Callable[[], Refused]], Any]:
    """Register a case: (model, optimizer, what to call), the error, and parts of its message."""

    def register(function: Callable[[], Refused]) -> Callable[[], Refused]:
        CASES[function.__name__.replace("_", " ")] = function, error, parts
        return function

    return register


def trained(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimizer with state; the model keeps its gradients."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, **options)
    train(model, optimizer, steps=1)
    return optimizer


def with_masks(change: Callable[[dict[str, Any]], Any], model: nn.Module | None = None) -> Refused:
    """Compaction of a trained model with masks that ``change`` has spoilt."""
    model = mlp() if model is None else model
    masks: dict[str, Any] = random_masks(model)
    optimizer = trained(model)
    change(masks)
    return model, optimizer, lambda: sparse_comm.compact(model, masks, optimizer=optimizer)


# ---------------------------------------------------------------- masks

# What becomes of the mask of the last parameter, '4.weight' of shape (7, 65): those before it are
# fine, and must not be touched either.
MASKS: dict[str, tuple[Callable[[Tensor], Any], type[Exception], tuple[str, ...]]] = {
    "a mask of another shape": (lambda m: m[:, 1:], ValueError, ("(7, 64)", "(7, 65)")),
    "a transposed mask of equal size": (
        lambda m: m.mT,
        ValueError,
        ("(65, 7)", "(7, 65)", "transposed", "mask.mT"),
    ),
    "a flattened mask": (lambda m: m.flatten(), ValueError, ("(455,)", "(7, 65)", "reshape")),
    "a pattern of another shape": (
        lambda m: sparse_comm.SparsityPattern(m.mT),
        ValueError,
        ("(65, 7)", "(7, 65)"),
    ),
    "a mask of floats": (lambda m: m.float(), TypeError, ("torch.bool", "float32", "mask != 0")),
    "a mask that is no tensor": (lambda m: m.numpy(), TypeError, ("torch.Tensor", "ndarray")),
    "no mask": (lambda m: None, TypeError, ("torch.Tensor", "NoneType")),
}
for _name, (_change, _error, _parts) in MASKS.items():
    CASES[_name] = (
        functools.partial(
            with_masks, lambda m, c=_change: m.update({"4.weight": c(m["4.weight"])})
        ),
        _error,
        ("'4.weight'", *_parts),
    )


@refused(ValueError, "'2.wieght'", "no parameter of that name", "did you mean '2.weight'?")
def an_unknown_name() -> Refused:
    return with_masks(lambda m: m.update({"2.wieght": m.pop("2.weight")}))


@refused(ValueError, "'elsewhere'", "no parameter of that name", "the model has 0.weight")
def a_name_that_resembles_none() -> Refused:
    return with_masks(lambda m: m.update(elsewhere=m["2.weight"]))


@refused(ValueError, "'out.weight'", "tied to 'embed.weight'", "one mask")
def two_masks_of_a_tied_pair() -> Refused:
    return with_masks(lambda m: m.update({"out.weight": ~m["embed.weight"]}), seeded(Tied))


# ---------------------------------------------------------------- arguments


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "an unknown mode": ({"weights": "cahced"}, ValueError, ("'cahced'", "cached", "transient")),
    "a compute_dtype of integers": ({"compute_dtype": torch.int32}, TypeError, ("torch.int32",)),
    "a compute_dtype that is no dtype": ({"compute_dtype": "bf16"}, TypeError, ("'bf16'",)),
    "a list as optimizer": ({"optimizer": []}, TypeError, ("torch.optim.Optimizer", "list")),
    "masks that are no dict": ({"masks": []}, TypeError, ("dict of name to mask", "list")),
    "a model that is no module": ({"model": {}}, TypeError, ("torch.nn.Module", "dict")),
}


def with_arguments(arguments: dict[str, Any]) -> Refused:
    model = mlp()
    given = {"model": model, "masks": random_masks(model), **arguments}
    return model, None, lambda: sparse_comm.compact(**given)


for _name, (_arguments, _error, _parts) in ARGUMENTS.items():
    CASES[_name] = functools.partial(with_arguments, _arguments), _error, _parts


@refused(ValueError, "compact already", "update_masks", "densify")
def compacting_twice() -> Refused:
    model = mlp()
    masks = random_masks(model)
    sparse_comm.compact(model, masks)
    return model, None, lambda: sparse_comm.compact(model, masks)


@refused(ValueError, "compact already", "update_masks", "densify")
def compacting_a_model_of_which_a_part_is_compact() -> Refused:
    model = mlp()
    masks = random_masks(model)
    sparse_comm.compact(model[2], {"weight": masks["2.weight"]})
    return model, None, lambda: sparse_comm.compact(model, {"0.weight": masks["0.weight"]})


@contextlib.contextmanager
def group_of_one() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_ddp(what: str) -> Refused:
    model = mlp()
    if what != "compact":
        sparse_comm.compact(model, random_masks(model))
    with group_of_one():
        ddp = nn.parallel.DistributedDataParallel(model)
    masks = () if what == "densify" else ({},)
    return ddp, None, lambda: getattr(sparse_comm, what)(ddp, *masks)


for _name in ("compact", "densify", "update_masks"):
    CASES[f"{_name} of a model in DDP"] = (
        functools.partial(in_ddp, _name),
        ValueError,
        ("before wrapping it", f"DistributedDataParallel({_name}(model"),
    )


# ---------------------------------------------------------------- parameters and modules


NOT_REAL = ("real floating parameters", "leave it out of the masks")
MODULES: dict[str, tuple[Callable[[], nn.Module], type[Exception], tuple[str, ...]]] = {
    "an embedding with max_norm": (
        lambda: nn.Embedding(3, 3, max_norm=1.0),
        ValueError,
        ("Embedding(max_norm=1.0)", "set max_norm=None"),
    ),
    "an embedding bag with max_norm": (
        lambda: nn.EmbeddingBag(3, 3, max_norm=1.0),
        ValueError,
        ("Embedding(max_norm=1.0)", "set max_norm=None"),
    ),
    "an embedding with sparse gradients": (
        lambda: nn.Embedding(3, 3, sparse=True),
        ValueError,
        ("Embedding(sparse=True)", "set sparse=False"),
    ),
    "a sparse parameter": (
        lambda: Holder(torch.eye(3).to_sparse()),
        ValueError,
        ("torch.sparse_coo", "torch.strided", "to_dense()"),
    ),
    "a quantised parameter": (
        lambda: Holder(torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)),
        TypeError,
        ("torch.qint8", *NOT_REAL),
    ),
    "an integer parameter": (
        lambda: Holder(torch.eye(3).long()),
        TypeError,
        ("torch.int64", *NOT_REAL),
    ),
    "a complex parameter": (
        lambda: Holder(torch.eye(3).to(torch.complex64)),
        TypeError,
        ("torch.complex64", *NOT_REAL),
    ),
    "a parameter of a tensor subclass": (
        lambda: Holder(torch.eye(3).as_subclass(Subclass)),
        TypeError,
        ("Subclass", "ordinary tensors", "leave it out of the masks"),
    ),
    "a lazy module": (lambda: nn.LazyLinear(3), ValueError, ("lazy", "run a forward")),
    "a scripted module within": (
        lambda: torch.jit.script(nn.Linear(3, 3)),
        TypeError,
        ("ScriptModule", "eager module"),
    ),
    "a parameter with a gradient hook": (
        lambda: with_hook("register_hook"),
        ValueError,
        ("gradient hooks", "after compact"),
    ),
    "a parameter with a hook on its accumulated gradient": (
        lambda: with_hook("register_post_accumulate_grad_hook"),
        ValueError,
        ("gradient hooks", "after compact"),
    ),
}


class Holder(nn.Module):
    """One parameter, of a kind that the case says."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class Subclass(Tensor):
    """A tensor of another kind."""


def with_hook(register: str) -> nn.Module:
    module = nn.Linear(3, 3)
    getattr(module.weight, register)(lambda grad: None)
    return module


def within_a_model(make: Callable[[], nn.Module], name: str = "weight") -> Refused:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(make()))
    masks = {"0.weight": torch.eye(3).bool(), f"1.0.{name}": torch.eye(3).bool()}
    return model, None, lambda: sparse_comm.compact(model, masks)


for _name, (_make, _error, _parts) in MODULES.items():
    CASES[_name] = functools.partial(within_a_model, _make), _error, ("'1.0.weight'", *_parts)


@refused(ValueError, "'1.0.parametrizations.weight.original'", "remove_parametrizations")
def a_parametrized_module() -> Refused:
    make = lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))  # noqa: E731
    return within_a_model(make, "parametrizations.weight.original")


@refused(TypeError, "ScriptModule", "eager model")
def a_scripted_model() -> Refused:
    model = torch.jit.script(nn.Linear(3, 3))
    return model, None, lambda: sparse_comm.compact(model, {"weight": torch.eye(3).bool()})


# ---------------------------------------------------------------- optimizers


@refused(TypeError, "Adafactor", "second moment", "elementwise optimizer")
def adafactor() -> Refused:
    model = mlp()
    masks, optimizer = random_masks(model), torch.optim.Adafactor(model.parameters())
    return model, optimizer, lambda: sparse_comm.compact(model, masks, optimizer=optimizer)


@refused(TypeError, "Muon", "orthogonalise", "stay dense")
def muon() -> Refused:
    model = mlp()
    optimizer = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2])
    masks = random_masks(model)
    return model, optimizer, lambda: sparse_comm.compact(model, masks, optimizer=optimizer)


@refused(ValueError, "holds none of the parameters", "'0.weight'", "built on this model")
def the_optimizer_of_another_model() -> Refused:
    model = mlp()
    masks, optimizer = random_masks(model), trained(mlp())
    return model, optimizer, lambda: sparse_comm.compact(model, masks, optimizer=optimizer)


@refused(ValueError, "'exp_avg'", "AdamW", "'4.weight'", "(7,)", "(7, 65)", "build the optimizer")
def an_optimizer_with_state_of_another_shape() -> Refused:
    model = mlp()
    masks, optimizer = random_masks(model), trained(model)
    optimizer.state[model[4].weight]["exp_avg"] = torch.zeros(7)
    return model, optimizer, lambda: sparse_comm.compact(model, masks, optimizer=optimizer)


# ---------------------------------------------------------------- loading and updating


def loading(change: Callable[[dict[str, Any]], Any]) -> Refused:
    model, other = mlp(), mlp()
    masks = random_masks(model)
    optimizer = trained(model)
    sparse_comm.compact(model, masks, optimizer=optimizer)
    sparse_comm.compact(other, same_nnz_masks(masks))
    trained(other)
    state = other.state_dict()
    change(state)
    return model, optimizer, lambda: model.load_state_dict(state)


@refused(RuntimeError, "'4.weight'", "(5, 5)", "(7, 65)", "nothing was loaded")
def a_state_dict_of_another_shape() -> Refused:
    return loading(
        lambda s: s.update(sparse_comm.dense_state_dict(mlp()), **{"4.weight": torch.ones(5, 5)})
    )


@refused(RuntimeError, "'0.weight'", "another pattern", "dense_state_dict", "nothing was loaded")
def a_state_dict_of_another_pattern_of_equal_nnz() -> Refused:
    return loading(lambda state: None)


def updating(change: Callable[[dict[str, Any]], Any]) -> Refused:
    model = mlp()
    masks: dict[str, Any] = random_masks(model)
    optimizer = trained(model)
    sparse_comm.compact(model, masks, optimizer=optimizer)
    new: dict[str, Any] = same_nnz_masks(masks)
    change(new)
    return model, optimizer, lambda: sparse_comm.update_masks(model, new, optimizer=optimizer)


@refused(ValueError, "'1.bias'", "no compact parameter", "0.weight")
def updating_the_mask_of_a_dense_parameter() -> Refused:
    return updating(lambda m: m.update({"1.bias": torch.ones(65, dtype=torch.bool)}))


@refused(ValueError, "'4.weight'", "(65, 7)", "(7, 65)", "transposed")
def updating_with_a_mask_of_another_shape() -> Refused:
    return updating(lambda m: m.update({"4.weight": m["4.weight"].mT}))


@refused(TypeError, "dict of name to mask", "int")
def updating_with_no_masks() -> Refused:
    model = sparse_comm.compact(mlp(), random_masks(mlp()))
    return model, None, lambda: sparse_comm.update_masks(model, 3)  # type: ignore[arg-type]


@refused(ValueError, "holds none of the parameters", "'0.weight'")
def updating_with_the_optimizer_of_another_model() -> Refused:
    model = sparse_comm.compact(mlp(), random_masks(mlp()))
    masks, optimizer = same_nnz_masks(random_masks(mlp())), trained(mlp())
    return model, optimizer, lambda: sparse_comm.update_masks(model, masks, optimizer=optimizer)


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.torch.jit.script", "ignore:torch.quantize_per_tensor")
def test_it_is_refused_with_a_reason_and_leaves_the_model_as_it_was(case):
    build, error, parts = CASES[case]
    model, optimizer, call = build()
    before = everything(model, optimizer)
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    missing = [part for part in parts if part not in message]
    assert not missing, message
    assert everything(model, optimizer) == before
