"""One rank of the equivalence check: trains masked dense and compact, and compares them."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import sparse_comm

from .deepspeed_run import without_inference_kernel
from .job import join, leave, read_job
from .launch import rank_main, report_progress
from .model import GPT, VOCABULARY
from .rank_order import RankOrderReduceScatter, all_reduce_in_rank_order
from .ulps import largest, ulp, ulps_apart

LAYERS, WIDTH, CONTEXT, BATCH = 2, 128, 16, 2
LR, WEIGHT_DECAY = 1e-3, 0.1


# fp32 parameters and arithmetic; fp32 parameters under autocast; the same with a bf16 dense weight
# (compute_dtype), and with the embedding unmasked, too; bf16 parameters; fp32 shards gathered as
# bf16, gradients reduced in bf16 or fp32.
PRECISIONS = (
    "fp32",
    "autocast",
    "autocast, bf16 weights",
    "autocast, bf16 weights, dense embedding",
    "bf16 values",
    "policy bf16",
    "policy bf16, reduce fp32",
)


Mode = Literal["cached", "transient"]


@dataclass(frozen=True)
class Layout:
    """How the model is spread over ranks."""

    wrap: str  # "none", "ddp", "fsdp2", or "zero0" to "zero3" of DeepSpeed
    ranks: int
    in_rank_order: bool = False  # add gradients in the order of ranks, not in gloo's


@dataclass(frozen=True)
class Case:
    """One pair of trainings of a layout."""

    weights: Mode
    optimizer: str  # "AdamW single", "AdamW foreach", "AdamW fused" or "SGD foreach"
    precision: str = "fp32"  # one of PRECISIONS


@dataclass(frozen=True)
class Job:
    """What all ranks of a launch do: every case of one layout."""

    layout: Layout
    cases: tuple[Case, ...]
    steps: int
    density: float
    seed: int

    @staticmethod
    def of(fields: dict) -> "Job":
        layout = Layout(**fields.pop("layout"))
        cases = tuple(Case(**case) for case in fields.pop("cases"))
        return Job(layout, cases, **fields)


@dataclass
class Side:
    """One of the two trainings."""

    module: nn.Module  # what forward is called on
    model: nn.Module
    optimizer: torch.optim.Optimizer
    factors: dict[str, Tensor]  # masks to multiply the weights by; none on the compact side
    precision: str

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """One training step; returns this rank's loss."""
        if hasattr(self.module, "basic_optimizer"):  # DeepSpeed's engine
            loss = self.module(tokens, targets)
            self.module.backward(loss)  # type: ignore[operator]
            self.module.step()  # type: ignore[operator]
            return loss.item()
        self.optimizer.zero_grad()
        with self._autocast():
            loss = self.module(tokens, targets)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for name, factor in self.factors.items():
                self.model.get_parameter(name).mul_(factor)
        return loss.item()

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision.startswith("autocast"):
            return torch.autocast("cpu", torch.bfloat16)
        return contextlib.nullcontext()


def main(workdir: Path, rank: int, arguments: list[str]) -> dict:
    """Run every case of one layout; returns a dict of results a case, ready for JSON."""
    job = Job.of(read_job(arguments))
    torch.set_num_threads(1)
    if job.layout.wrap.startswith("zero"):
        size = str(job.layout.ranks)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if job.layout.wrap != "none":
        join(workdir, rank, job.layout.ranks)
    results = []
    for case in job.cases:
        results.append(compare(case, job, rank))
        report_progress(done=True)
    leave()
    return {"cases": results}


def compare(case: Case, job: Job, rank: int) -> dict:
    """Train both sides from one start; where the optimizer is fused, also step by step."""
    masks = make_masks(case, job)
    batches = make_batches(job, rank)
    sides = [make_side(compact, case, job, masks) for compact in (False, True)]
    losses = [[side.step(*batch) for batch in batches] for side in sides]
    dense, compact = (whole_weights(side) for side in sides)
    pruned = sum(
        int(weights[name][~mask].count_nonzero())
        for weights in (dense, compact)
        for name, mask in masks.items()
    )
    pairs = [(packed(dense, masks)[n], w) for n, w in packed(compact, masks).items()]
    result = {
        "losses": losses,
        "pruned weights not zero": pruned,
        "unpruned weights": sum(a.numel() for a, _ in pairs),
        "weights that differ": sum(int((a != b).sum()) for a, b in pairs),
        "max weight difference": max(float((a - b).abs().max()) for a, b in pairs),
        "max ulps of weights above the learning rate": max(
            largest(ulps_apart(a, b)[(a.minimum(b) > LR) | (a.maximum(b) < -LR)]) for a, b in pairs
        ),
    }
    if case.optimizer.endswith("fused"):
        dense_side, compact_side = (make_side(c, case, job, masks) for c in (False, True))
        result["one step"] = one_step_apart(dense_side, compact_side, masks, batches)
    return result


def one_step_apart(
    dense: Side, compact: Side, masks: dict[str, Tensor], batches: list[tuple[Tensor, Tensor]]
) -> dict:
    """How far one step takes equal states apart: the largest over all steps.

    Before each step the compact side gets the dense side's weights and optimizer state; then each
    makes a whole step of its own: forward, backward, reduction, optimizer. Distances are counted in
    ulps of the weight before or after the step, whichever is larger: a weight that crosses zero
    has tiny ulps, but its rounding errors are those of the numbers that it is the difference of.
    """
    found = {"losses differ": 0, "gradients differ": 0, "weights differ": 0, "beyond 1 ulp": 0}
    most = {"max ulps": 0.0, "max ulps of weights that moved by less than a quarter": 0.0}
    for batch in batches:
        copy_state(dense, compact, masks)
        before = packed(whole(dense.parameters()), masks)
        losses = [side.step(*batch) for side in (dense, compact)]
        found["losses differ"] += losses[0] != losses[1]
        gradients = [
            whole({n: p.grad for n, p in side.parameters().items() if p.grad is not None})
            for side in (dense, compact)
        ]
        expected = packed(gradients[0], masks)
        found["gradients differ"] += sum(
            int((expected[name] != grad).sum()) for name, grad in gradients[1].items()
        )
        after = packed(whole(dense.parameters()), masks)
        for name, weight in whole(compact.parameters()).items():
            larger = torch.maximum(before[name].abs(), after[name].abs())
            ulps = (after[name] - weight).abs() / ulp(larger)
            settled = (after[name] - before[name]).abs() * 4 < larger
            found["weights differ"] += int((after[name] != weight).sum())
            found["beyond 1 ulp"] += int((ulps > 1).sum())
            for key, value in zip(most, (ulps, ulps[settled]), strict=True):
                most[key] = max(most[key], largest(value))
    return {**found, **most}


def make_masks(case: Case, job: Job) -> dict[str, Tensor]:
    """Random masks of all matrices but the position embedding; biases and norms stay dense."""
    generator = torch.Generator().manual_seed(job.seed)
    dense = ["position_embedding.weight"]
    if case.precision.endswith("dense embedding"):
        dense.append("token_embedding.weight")
    return {
        name: torch.rand(p.shape, generator=generator) < job.density
        for name, p in GPT(LAYERS, WIDTH, CONTEXT).named_parameters()
        if p.dim() >= 2 and name not in dense
    }


def make_batches(job: Job, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Sequences that a model can learn: each token is the one before plus 1, 2 or 3."""
    batches = []
    for step in range(job.steps):
        seed = (job.seed * 1_000_000 + step) * job.layout.ranks + rank
        generator = torch.Generator().manual_seed(seed)
        jumps = torch.randint(1, 4, (BATCH, CONTEXT + 1), generator=generator)
        windows = jumps.cumsum(1) % VOCABULARY
        batches.append((windows[:, :-1], windows[:, 1:]))
    return batches


def make_side(compact: bool, case: Case, job: Job, masks: dict[str, Tensor]) -> Side:
    """A pruned model, wrapped, with its optimizer."""
    torch.manual_seed(job.seed)
    model = GPT(LAYERS, WIDTH, CONTEXT)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask.float())
    if case.precision == "bf16 values":
        model.bfloat16()
    if compact:
        narrow = torch.bfloat16 if case.precision.startswith("autocast, bf16 weights") else None
        sparse_comm.compact(model, masks, weights=case.weights, compute_dtype=narrow)
    is_zero = job.layout.wrap.startswith("zero")
    module = model if is_zero else wrap(model, job.layout, case.precision)
    groups = sparse_comm.param_groups(model, WEIGHT_DECAY)
    kind, implementation = case.optimizer.split()
    optimizer = getattr(torch.optim, kind)(
        groups,
        lr=LR,
        foreach=implementation == "foreach",
        fused=implementation == "fused",
    )
    if is_zero:
        if not compact:
            mask_gradients(model, masks)
        engine = zero_engine(model, optimizer, int(job.layout.wrap[-1]))
        return Side(engine, model, optimizer, {}, case.precision)
    factors = {} if compact else {n: spread(m, model.get_parameter(n)) for n, m in masks.items()}
    return Side(module, model, optimizer, factors, case.precision)


def wrap(model: GPT, layout: Layout, precision: str) -> nn.Module:
    """DDP, or FSDP2 as in its tutorial: each block, then the rest."""
    if layout.wrap == "none":
        return model
    if layout.wrap == "ddp":
        ddp = DistributedDataParallel(model)
        if layout.in_rank_order:
            ddp.register_comm_hook(None, all_reduce_in_rank_order)
        return ddp
    policy = MixedPrecisionPolicy()
    if precision.startswith("policy bf16"):
        reduce = torch.float32 if precision.endswith("reduce fp32") else None
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce)
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=policy)
        if layout.in_rank_order:
            module.set_custom_reduce_scatter(RankOrderReduceScatter())
    return model


def mask_gradients(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Pruned weights, which are zero, get no gradient: ZeRO's copies of them cannot be masked."""
    for name, mask in masks.items():
        model.get_parameter(name).register_hook(lambda grad, mask=mask: grad * mask)


def zero_engine(model: GPT, optimizer: torch.optim.Optimizer, stage: int) -> nn.Module:
    """DeepSpeed's engine around the model, which may be compact."""
    import deepspeed
    from sparse_comm.integrations.deepspeed import watch

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,  # by default 1: the norm is summed in another order
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    without_inference_kernel()
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return watch(engine) if sparse_comm.is_compact(model) else engine


def spread(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask as a factor, in the parameter's dtype and sharded as it is."""
    factor = mask.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(factor, mesh, placements, src_data_rank=None)
    return factor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors; sharded ones are gathered, all in one collective."""
    mine = {n: t.to_local().detach() for n, t in tensors.items() if isinstance(t, DTensor)}
    if not mine:
        return {name: t.detach().clone() for name, t in tensors.items()}
    shards: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shards, mine)
    return {
        name: torch.cat([shard[name] for shard in shards]) if name in mine else t.detach().clone()
        for name, t in tensors.items()
    }


def whole_weights(side: Side) -> dict[str, Tensor]:
    """Dense weights of either side, by name."""
    if any(hasattr(parameter, "ds_id") for parameter in side.model.parameters()):
        return gathered_weights(side.model)
    if sparse_comm.is_compact(side.model):
        return whole(sparse_comm.dense_state_dict(side.model))
    return whole(side.parameters())


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """Of a model that ZeRO 3 has partitioned."""
    import deepspeed

    found = {}
    for path, module in model.named_modules():
        parameters = list(module.parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters)):
            for name in module._parameters:
                weight = getattr(module, name)
                found[f"{path}.{name}"] = torch.clone(weight.detach())
    return found


def packed(tensors: Mapping[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unpruned entries: what a compact parameter of each name holds."""
    return {name: t[masks[name]] if name in masks else t for name, t in tensors.items()}


@torch.no_grad()
def copy_state(dense: Side, compact: Side, masks: dict[str, Tensor]) -> None:
    """Give the compact side the dense side's weights and optimizer state, bit for bit."""
    sources: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for name, parameter in compact.parameters().items():
        source = dense.model.get_parameter(name)
        sources[name], targets[name] = source, parameter
        for key, value in dense.optimizer.state.get(source, {}).items():
            if value.shape == source.shape:  # and not the number of steps
                sources[f"{name} {key}"] = value
                targets[f"{name} {key}"] = compact.optimizer.state[parameter][key]
    for key, value in whole(sources).items():
        mask = masks.get(key.split()[0])
        value = value if mask is None else value[mask]
        target = targets[key]
        if isinstance(target, DTensor):
            start = dist.get_rank() * -(-len(value) // dist.get_world_size())
            target = target.to_local()
            value = value[start : start + len(target)]
        target.copy_(value)


if __name__ == "__main__":
    rank_main(main)
