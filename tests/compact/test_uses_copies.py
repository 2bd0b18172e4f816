"""Compact modules copied, converted, materialised, and used by threads and processes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import sparse_comm
from tests.compact.uses import (
    MODES,
    Pair,
    linear,
    mask_,
    mask_like,
    mlp,
    noise,
    pair,
    same,
)

pytestmark = MODES


# ---------------------------------------------------------------- copies and conversions


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: _saved_and_loaded(m),
    ],
)
def test_copies_of_modules_work(weights, copied):
    both = pair(mlp, weights, noise(3, 6))
    both.check()
    twin = copied(both.compact)
    assert sparse_comm.is_compact(twin)
    Pair(twin, both.dense, both.masks, both.inputs).check()
    both.use(lambda m: m[0].weight.data.mul_(2))
    both.check()
    shares = copied is copy.copy
    assert torch.equal(twin[0].weight, both.compact[0].weight) == shares


def _saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(params=["swap", "overwrite"])
def future(request):
    setters = {
        "swap": torch.__future__.set_swap_module_params_on_conversion,
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
    }
    setters[request.param](True)
    yield request.param
    setters[request.param](False)


def test_conversions_that_swap_or_overwrite_parameters_work(weights, future):
    both = linear(weights)
    both.use(lambda m: m.double())
    both.check(noise(3, 6).double())
    state = {"weight": noise(5, 6).double(), "bias": noise(5).double()}
    both.use(lambda m: m.load_state_dict(dict(state)))
    both.check(noise(3, 6).double())
    both.use(lambda m: m.float())
    both.check()


# ---------------------------------------------------------------- meta device


def meta_mlp() -> nn.Module:
    with torch.device("meta"):
        return mlp()


def masks_of_mlp() -> dict[str, Tensor]:
    return {"0.weight": mask_like(noise(8, 6)), "2.weight": mask_like(noise(4, 8))}


def test_meta_modules_are_materialised_by_to_empty_and_load(weights):
    both = pair(meta_mlp, weights, noise(3, 6), masks=masks_of_mlp())
    assert both.compact[0].weight.is_meta
    assert both.compact(torch.empty(3, 6, device="meta")).shape == (3, 4)
    state = mlp().state_dict()
    both.use(lambda m: m.to_empty(device="cpu"))
    both.use(lambda m: m.load_state_dict(dict(state)))
    both.check()


def test_meta_modules_are_materialised_by_assign(weights):
    both = pair(meta_mlp, weights, noise(3, 6), masks=masks_of_mlp())
    state = mlp().state_dict()
    both.use(lambda m: m.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True))
    both.check()


def test_meta_modules_are_materialised_and_initialised(weights):
    both = pair(meta_mlp, weights, noise(3, 6), masks=masks_of_mlp())
    both.use(lambda m: m.to_empty(device="cpu"))
    both.use(lambda m: [layer.reset_parameters() for layer in m if isinstance(layer, nn.Linear)])
    both.check()


def test_modules_made_and_compacted_under_a_meta_device_context(weights):
    masks = masks_of_mlp()
    with torch.device("meta"):
        compact = sparse_comm.compact(mlp(), masks, weights=weights)
    dense = mlp()
    mask_(dense, masks)
    compact.load_state_dict(dense.state_dict(), assign=True)
    Pair(compact, dense, masks, (noise(3, 6),)).check()


# ---------------------------------------------------------------- inference


def test_evaluation_without_gradients_and_then_training_works(weights):
    both = pair(mlp, weights, noise(3, 6))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            same(*both.each(lambda m: m(noise(3, 6))))
        both.check()
        both.use(lambda m: m[0].weight.data.mul_(2))
        with mode():
            same(*both.each(lambda m: m(noise(3, 6))))
            both.use(lambda m: m[2].weight.mul_(2))
        both.check()


def test_modules_made_in_inference_mode_work_there(weights):
    with torch.inference_mode():
        both = pair(mlp, weights, noise(3, 6))
        same(*both.each(lambda m: m(noise(3, 6))))
        both.use(lambda m: m[0].weight.mul_(2))
        same(*both.each(lambda m: m(noise(3, 6))))
        both.check_weights()


# ---------------------------------------------------------------- threads and processes


def test_threads_may_run_forward_and_backward_at_once(weights):
    both = pair(lambda: nn.Linear(300, 300), weights, noise(3, 300))
    failures: list[BaseException] = []
    for _ in range(20):
        both.use(lambda m: m.weight.data.mul_(1.1))
        expected = both.dense(noise(3, 300)).detach()
        start = threading.Barrier(4)

        def work(start=start, expected=expected) -> None:
            try:
                start.wait()
                out = both.compact(noise(3, 300))
                same(out, expected)
                out.sum().backward()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    both.check()


def test_shared_memory_works(weights):
    both = linear(weights)
    both.use(lambda m: m.share_memory())
    assert both.values().is_shared()
    both.check()


def double_the_values(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight.mul_(2)


def test_what_another_process_writes_to_shared_values_takes_effect(weights):
    both = linear(weights)
    both.use(lambda m: m.share_memory())
    both.check()
    process = mp.get_context("fork").Process(target=double_the_values, args=(both.compact,))
    process.start()
    process.join()
    both.use(lambda m: None)
    double_the_values(both.dense)
    both.check()
