"""PyTorch's own tools on compact modules: they work, or raise and say what to do instead."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import sparse_comm
from tests.compact.uses import MODES, Pair, linear, mask_, mask_like, noise, pair, refused, same
from tests.launch import CONTEXT, run

pytestmark = MODES


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


# ---------------------------------------------------------------- tools that take a weight out


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


ON_TOP = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "the old weight_norm": torch.nn.utils.weight_norm,
    "the old spectral_norm": torch.nn.utils.spectral_norm,
    "prune.l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "prune.ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, n=2, dim=0),
    "prune.custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.ones(5, 6)),
}


@pytest.mark.parametrize("tool", ON_TOP)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_replaces_a_compact_weight_raises(weights, tool):
    both = linear(weights)
    names = [name for name, _ in both.compact.named_parameters()]
    with refused(both, (RuntimeError, ValueError), "'weight'", "sparse_comm.densify"):
        ON_TOP[tool](both.compact)
    assert [name for name, _ in both.compact.named_parameters()] == names
    assert type(both.compact).__name__ == "Linear"
    assert not both.compact._forward_pre_hooks


def test_global_pruning_on_top_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    with refused(both, (RuntimeError, ValueError), "'0.weight'", "sparse_comm.densify"):
        prune.global_unstructured(
            [(both.compact[0], "weight"), (both.compact[2], "weight")],
            prune.L1Unstructured,
            amount=0.5,
        )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_on_an_rnn_leaves_the_order_of_its_parameters(weights):
    both = pair(lambda: nn.LSTM(4, 3), weights, noise(2, 1, 4))
    with refused(both, RuntimeError, "'weight_hh_l0'", "sparse_comm.densify"):
        torch.nn.utils.weight_norm(both.compact, "weight_hh_l0")


def test_parametrizations_below_are_refused(weights):
    module = parametrizations.weight_norm(nn.Linear(6, 5))
    name = "parametrizations.weight.original1"
    with pytest.raises(ValueError, match="remove_parametrizations"):
        sparse_comm.compact(module, {name: torch.rand(5, 6) < 0.5}, weights=weights)
    assert module(noise(1, 6)).shape == (1, 5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_below_works(weights):
    both = pair(
        lambda: torch.nn.utils.weight_norm(nn.Linear(6, 5)),
        weights,
        noise(3, 6),
        masks={"weight_v": mask_like(noise(5, 6))},
    )
    both.check()


def test_torch_pruning_below_works(weights):
    def make() -> nn.Module:
        return prune.custom_from_mask(nn.Linear(6, 5), "weight", mask_like(noise(5, 6)))

    masks = {"weight_orig": mask_like(noise(5, 6))}
    both = pair(make, weights, noise(3, 6), masks=masks)
    both.check()
    both.use(lambda m: m.weight_orig.data.mul_(2))
    both.check()


def test_other_parameters_of_a_compact_module_can_be_parametrized(weights):
    both = linear(weights)
    both.each(lambda m: parametrize.register_parametrization(m, "bias", Double()))
    both.check()
    both.compact = copy.deepcopy(both.compact)
    both.check()
    sparse_comm.densify(both.compact)
    same(*both.each(lambda m: m(noise(3, 6))))
    both.each(lambda m: parametrize.remove_parametrizations(m, "bias"))
    assert type(both.compact) is nn.Linear
    same(*both.each(lambda m: m(noise(3, 6))))


def test_parametrizations_of_other_parameters_can_be_removed(weights):
    both = linear(weights)
    both.each(lambda m: parametrize.register_parametrization(m, "bias", Double()))
    both.each(lambda m: parametrize.remove_parametrizations(m, "bias"))
    both.check()
    sparse_comm.densify(both.compact)
    assert type(both.compact) is nn.Linear


def test_sync_batch_norm_conversion_of_masked_norms_raises(weights):
    def make() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))

    both = pair(make, weights, noise(2, 4, 2, 2), masks={"1.weight": mask_like(noise(4))})
    with refused(both, RuntimeError, "'1.weight'", "before sparse_comm.compact"):
        nn.SyncBatchNorm.convert_sync_batchnorm(both.compact)


def test_sync_batch_norm_conversion_of_other_norms_works(weights):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    both = pair(make, weights, noise(2, 3, 5, 5))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(both.compact)
    assert type(converted[1]) is nn.SyncBatchNorm
    both.compact = converted.eval()
    both.dense.eval()
    both.check()


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_dynamic_quantization_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    for spec in ({nn.Linear}, {"0": torch.ao.quantization.default_dynamic_qconfig}, None):
        with refused(both, RuntimeError, "quantization", "sparse_comm.densify(model)"):
            torch.ao.quantization.quantize_dynamic(both.compact, spec)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
def test_static_quantization_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    with refused(both, RuntimeError, "quantization", "sparse_comm.densify(model)"):
        both.compact.qconfig = torch.ao.quantization.get_default_qconfig()
        torch.ao.quantization.prepare(both.compact)


def test_data_parallel_replication_raises(weights):
    """It is what DataParallel does with each module, on two GPUs and more."""
    both = pair(mlp, weights, noise(3, 6))
    for module in (both.compact, both.compact[0]):
        with refused(both, RuntimeError, "DistributedDataParallel"):
            module._replicate_for_data_parallel()


def plans_after_compact(rank: int, world_size: int, weights: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (world_size,))
    both = linear(weights)
    with refused(both, RuntimeError, "'weight'", "out of the plan", "fully_shard"):
        parallelize_module(both.compact, mesh, ColwiseParallel())
    with refused(both, RuntimeError, "non-leaf"):  # PyTorch's own words, before ours
        parallelize_module(both.compact, mesh, RowwiseParallel())
    both = pair(lambda: nn.Embedding(9, 4), weights, torch.tensor([0, 8]))
    with refused(both, RuntimeError, "'weight'", "out of the plan", "fully_shard"):
        parallelize_module(both.compact, mesh, RowwiseParallel())
    with refused(both, IndexError, "Dimension out of range"):
        parallelize_module(both.compact, mesh, ColwiseParallel())
    both = pair(mlp, weights, noise(3, 6), masks={"0.weight": mask_like(noise(8, 6))})
    parallelize_module(both.compact, mesh, {"2": ColwiseParallel()})
    same(*both.each(lambda m: m(noise(3, 6))))
    assert both.values("0.weight").dim() == 1


def test_tensor_parallel_plans_for_compact_modules_raise_and_for_others_work(weights):
    run(plans_after_compact, 1, weights)


# ---------------------------------------------------------------- scripting, tracing, export


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_script_raises(weights):
    both = pair(mlp, weights, noise(3, 6))
    for module in (both.compact, both.compact[0], nn.Sequential(both.compact)):
        with refused(both, RuntimeError, "torch.jit.trace", "sparse_comm.densify(model)"):
            torch.jit.script(module)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_trace_works_and_follows_the_values(weights):
    both = pair(mlp, weights, noise(3, 6))
    traced = torch.jit.trace(both.compact, both.inputs)
    same(traced(*both.inputs), both.dense(*both.inputs))
    same(traced(noise(7, 6)), both.dense(noise(7, 6)))
    both.use(lambda m: m[0].weight.data.mul_(2))
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.check()


@pytest.mark.parametrize("strict", [True, False])
def test_export_works_and_follows_the_values(weights, strict):
    both = pair(mlp, weights, noise(3, 6))
    program = torch.export.export(both.compact, both.inputs, strict=strict)
    same(program.module()(*both.inputs), both.dense(*both.inputs))
    assert sorted(program.state_dict) == sorted(both.dense.state_dict())
    assert program.state_dict["0.weight"].shape == both.values("0.weight").shape
    both.check()


def test_fx_tracing_works(weights):
    both = pair(mlp, weights, noise(3, 6))
    traced = torch.fx.symbolic_trace(both.compact)
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.use(lambda m: m[0].weight.data.mul_(2))
    same(traced(*both.inputs), both.dense(*both.inputs))
    both.check()


# ---------------------------------------------------------------- torch.func


def loss_of(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, parameters, (x,)).square().sum()


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_functional_call_takes_values_dense_tensors_and_parameters(weights):
    both = linear(weights)
    x = noise(3, 6)
    mask = both.masks["weight"]
    doubled = {name: p * 2 for name, p in detached(both.compact).items()}
    dense = {name: p * 2 for name, p in detached(both.dense).items()}
    expected = functional_call(both.dense, dense, (x,))
    unmasked = {**dense, "weight": dense["weight"] + (~mask).float()}
    for tensors in (doubled, dense, unmasked):
        same(functional_call(both.compact, tensors, (x,)), expected)
        as_parameters = {name: nn.Parameter(t) for name, t in tensors.items()}
        same(functional_call(both.compact, as_parameters, (x,)), expected)
    both.check()  # the cache still holds the module's own weight


def test_functional_call_is_differentiable(weights):
    both = linear(weights)
    x = noise(3, 6)
    grads = []
    for module in (both.compact, both.dense):
        tensors = {name: p.requires_grad_() for name, p in detached(module).items()}
        loss_of(module, tensors, x).backward()
        grads.append(tensors["weight"].grad)
    same(grads[0], grads[1][both.masks["weight"]])
    assert both.values().grad is None
    both.check()


def test_gradients_per_sample_work(weights):
    both = pair(mlp, weights, noise(3, 6))
    x = noise(4, 6)
    per_sample = [
        vmap(grad(lambda p, x, m=module: loss_of(m, p, x)), in_dims=(None, 0))(detached(module), x)
        for module in (both.compact, both.dense)
    ]
    for name, theirs in per_sample[1].items():
        if name in both.masks:
            theirs = theirs[:, both.masks[name]]
        same(per_sample[0][name], theirs, exact=False)
    both.check()


def test_ensembles_of_values_work(weights):
    both = linear(weights)
    x = noise(3, 6)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in detached(both.compact).items()}
    out = vmap(lambda p: functional_call(both.compact, p, (x,)))(stacked)
    same(out, torch.stack([both.dense(x), 2 * both.dense(x)]), exact=False)
    both.check()


@pytest.mark.parametrize("transform", [jacrev, jacfwd, hessian])
def test_jacobians(weights, transform):
    both = pair(mlp, weights, noise(3, 6))
    results = []
    for module in (both.compact, both.dense):
        parameters, x = detached(module), noise(2, 6)

        def function(weight: Tensor, module=module, parameters=parameters, x=x) -> Tensor:
            out = functional_call(module, {**parameters, "0.weight": weight}, (x,))
            return out if transform is not hessian else out.square().sum()

        results.append(transform(function)(parameters["0.weight"]))
    mask = both.masks["0.weight"]
    expected = results[1][..., mask]
    if transform is hessian:
        expected = results[1][mask][:, mask]
    same(results[0], expected, exact=False)
    both.check()


def test_double_backward_gives_the_gradient_penalty(weights):
    both = pair(mlp, weights, noise(3, 6))

    def penalty(module: nn.Module) -> None:
        x = noise(3, 6).requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        (slope.norm(dim=1) - 1).square().sum().backward()

    both.use(penalty)
    both.check_gradients()
    both.each(lambda m: m.zero_grad())

    def of_the_values(module: nn.Module) -> None:
        loss = module(noise(3, 6)).square().sum()
        grads = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
        if module is both.dense:
            masks = [both.masks.get(name) for name, _ in module.named_parameters()]
            grads = [g if m is None else g * m for g, m in zip(grads, masks, strict=True)]
        sum(g.square().sum() for g in grads).backward()

    both.use(of_the_values)
    both.check_gradients(exact=False)


# ---------------------------------------------------------------- training tools


@pytest.mark.parametrize("foreach", [True, False])
def test_clip_grad_norm_works(weights, foreach):
    both = pair(mlp, weights, noise(3, 6))

    def clip(module: nn.Module) -> Tensor:
        module(noise(3, 6)).square().sum().backward()
        if module is both.dense:
            for name, mask in both.masks.items():
                module.get_parameter(name).grad.masked_fill_(~mask, 0)
        return nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=foreach)

    same(*both.use(clip), exact=False)
    both.check_gradients(exact=False)
    total = nn.utils.get_total_norm([p.grad for p in both.compact.parameters()])
    assert total == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("foreach", [True, False])
def test_clip_grad_value_works(weights, foreach):
    both = pair(mlp, weights, noise(3, 6))
    both.use(lambda m: m(noise(3, 6)).square().sum().backward())
    both.use(lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.2, foreach=foreach))
    both.check_gradients()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_autocast_works(weights, compute_dtype):
    both = pair(mlp, weights, noise(3, 6), compute_dtype=compute_dtype)

    def step(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = module(noise(3, 6))
        out.float().square().sum().backward()
        return out

    same(*both.each(step))
    both.check_gradients()
    assert both.values("0.weight").grad.dtype == torch.float32


def test_the_gradient_scaler_works(weights):
    both = pair(mlp, weights, noise(3, 6))

    def train(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for x in (noise(3, 6), noise(3, 6) * float("inf"), noise(3, 6, seed=1)):
            scaler.scale(module(x).square().sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            mask_(module, both.masks)

    both.each(train)
    both.check()


def test_without_autocast_a_compute_dtype_error_says_what_to_do(weights):
    both = linear(weights, compute_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as caught:
        both.compact(noise(3, 6))
    assert "'weight' has compute_dtype torch.bfloat16" in str(caught.value)
    assert "torch.autocast" in str(caught.value)
    out = nn.functional.linear(noise(3, 6).bfloat16(), both.compact.weight)
    same(out, nn.functional.linear(noise(3, 6).bfloat16(), both.dense.weight.bfloat16()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_works(weights, reentrant):
    both = pair(mlp, weights, noise(3, 6))

    def train(module: nn.Module) -> None:
        x = noise(3, 6).requires_grad_()
        checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
        checkpoint_sequential(module, 2, x, use_reentrant=reentrant).sum().backward()

    both.use(train)
    both.check_gradients()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_offloading_of_saved_tensors_works(weights, compute_dtype):
    both = pair(mlp, weights, noise(3, 6), compute_dtype=compute_dtype)

    def train(module: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu(), torch.autocast(
            "cpu", torch.bfloat16, enabled=compute_dtype is not None
        ):
            out = module(noise(3, 6))
        out.float().square().sum().backward()

    both.use(train)
    both.check_gradients()


def test_saved_tensor_hooks_of_the_user_see_the_activations(weights):
    both = pair(mlp, weights, noise(3, 6))
    shapes: list[list[tuple[int, ...]]] = []

    def train(module: nn.Module) -> None:
        seen: list[tuple[int, ...]] = []
        shapes.append(seen)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (seen.append(tuple(t.shape)), t)[1], lambda t: t
        ):
            module(noise(3, 6)).square().sum().backward()

    both.use(train)
    both.check_gradients()
    activations = [s for s in shapes[1] if 3 in s]
    assert [s for s in shapes[0] if 3 in s] == activations
    if weights == "transient":
        assert shapes[0] == activations  # and no dense weight


def test_averaged_models_work(weights):
    both = pair(mlp, weights, noise(3, 6))

    def average(module: nn.Module) -> AveragedModel:
        ema = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        mean = AveragedModel(module)
        for factor in (3.0, -2.0):
            with torch.no_grad():
                module[0].weight.mul_(factor)
                module[2].bias.add_(factor)
            ema.update_parameters(module)
            mean.update_parameters(module)
        return nn.ModuleList([ema.module, mean.module])

    ours, theirs = both.use(average)
    masks = {f"{i}.{name}": mask for i in (0, 1) for name, mask in both.masks.items()}
    for i in (0, 1):
        Pair(ours[i], theirs[i], both.masks, both.inputs).check()
    Pair(ours, theirs, masks, ()).check_weights()
    both.check()


# ---------------------------------------------------------------- copies, conversions, devices


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


def test_modules_made_and_compacted_under_a_meta_device_context(weights):
    masks = masks_of_mlp()
    with torch.device("meta"):
        compact = sparse_comm.compact(mlp(), masks, weights=weights)
    dense = mlp()
    mask_(dense, masks)
    compact.load_state_dict(dense.state_dict(), assign=True)
    Pair(compact, dense, masks, (noise(3, 6),)).check()


def test_meta_modules_are_materialised_and_initialised(weights):
    both = pair(meta_mlp, weights, noise(3, 6), masks=masks_of_mlp())
    both.use(lambda m: m.to_empty(device="cpu"))
    both.use(lambda m: [layer.reset_parameters() for layer in m if isinstance(layer, nn.Linear)])
    both.check()


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
