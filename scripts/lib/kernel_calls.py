"""What a call of pack and expand costs on small tensors, where it is the overhead that counts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from sparse_comm import kernels
from sparse_comm.kernels import native

from . import kernel_timing
from .bench import Estimate
from .kernel_cases import BF16, SELECT, make_dense, make_selection, ours, use
from .kernel_timing import Side, calls_that_take, interleave

DENSITY = 0.1
SIZES = (1 << 12, 1 << 16, 1 << 20)  # entries
TURN = 0.005  # seconds

Run = Callable[[], object]


@dataclass(frozen=True)
class CallRow:
    """One way to make the call, on one size."""

    operation: str
    how: str
    numel: int
    time: Estimate  # seconds


def measure(repeats: int, seed: int, on_turn: Callable[[], None]) -> list[CallRow]:
    """bf16 dense tensors and values, f = 0.1, in the caches, one thread."""
    use(ours()[0])
    runs = {
        (operation, how, numel): run
        for numel in SIZES
        for operation, ways in (("pack", _pack(numel, seed)), ("expand", _expand(numel, seed)))
        for how, run in ways.items()
    }
    sides = {key: Side(run, calls=calls_that_take(TURN, run)) for key, run in runs.items()}
    measured = interleave(sides, repeats, on_turn)
    return [CallRow(*key, kernel_timing.median(samples)) for key, samples in measured.items()]


def total_turns(repeats: int) -> int:
    return repeats * sum(len(_pack(8, 0)) + len(_expand(8, 0)) for _ in SIZES)


def _pack(numel: int, seed: int) -> dict[str, Run]:
    selection = make_selection(numel, DENSITY, seed)
    dense, pattern, index = make_dense(numel, seed)[BF16], selection.pattern, selection.index
    fields = (pattern.bitmap, pattern.offsets)
    out = torch.empty(pattern.nnz, dtype=BF16)
    operator = torch.ops.sparse_comm.pack
    ways: dict[str, Run] = {
        "kernels.pack": partial(kernels.pack, dense, pattern),
        "kernels.pack, out given": partial(kernels.pack, dense, pattern, out=out),
        "the operator alone": partial(operator, dense, *fields, pattern.nnz, None),
    }
    if not native.MISSING:
        ways["the native back-end alone"] = partial(native.pack_into, out, dense, *fields)
    for name in SELECT:
        ways[f"{name}, out given"] = partial(torch.index_select, dense, 0, index[name], out=out)
    return ways


def _expand(numel: int, seed: int) -> dict[str, Run]:
    selection = make_selection(numel, DENSITY, seed)
    pattern, index = selection.pattern, selection.index[SELECT[1]]
    values = make_dense(numel, seed)[BF16][: pattern.nnz].clone()
    fields = (pattern.bitmap, pattern.offsets)
    out = torch.empty(numel, dtype=BF16)
    operator = torch.ops.sparse_comm.expand
    ways: dict[str, Run] = {
        "kernels.expand": partial(kernels.expand, values, pattern),
        "kernels.expand, out given": partial(kernels.expand, values, pattern, out=out),
        "the operator alone": partial(operator, values, *fields, pattern.shape, None),
    }
    if not native.MISSING:
        ways["the native back-end alone"] = partial(native.expand_into, out, values, *fields)
    ways["zero_ and index_copy_"] = lambda: out.zero_().index_copy_(0, index, values)
    return ways
