"""What ``bench_kernels.py`` compares on a large tensor: pack, accumulate and expand, each by all.

A case is one operation on one pair of dtypes at one density. Its sides are ``sparse_comm.kernels``
with each back-end and instruction set, and what torch offers for the same; its floors are what
memory allows. Every side's result is held against the reference's, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparse_comm import SparsityPattern, kernels
from sparse_comm.kernels import native

from .kernel_floors import COPY, DATA_FILL, READ, ZERO_FILL, Floors, content
from .kernel_timing import Side, turns

BF16, FP32 = torch.bfloat16, torch.float32
PACK, ACCUMULATE, EXPAND = "pack", "accumulate", "expand"
# What is read and what is written: dense and values, or values and dense.
PAIRS = {
    PACK: ((BF16, BF16), (BF16, FP32), (FP32, FP32), (FP32, BF16)),
    ACCUMULATE: ((BF16, BF16), (BF16, FP32), (FP32, FP32)),
    EXPAND: ((FP32, BF16), (BF16, BF16), (FP32, FP32)),
}
SHORT = {BF16: "bf16", FP32: "fp32"}

REFERENCE = "reference"
SELECT = ("index_select, int32", "index_select, int64")
MASKED_SELECT, BOOL_INDEX = "masked_select", "t[bool]"
INDEX_COPY = "zero_ and index_copy_"
COPY_ONTO_ZEROS = "index_copy_ onto zeros"
SCATTER = "zero_ and masked_scatter_"


@dataclass(frozen=True)
class Selection:
    """Which entries are unpruned, in all forms that the sides need."""

    density: float
    mask: Tensor
    pattern: SparsityPattern
    index: dict[str, Tensor]  # by the names in SELECT

    @property
    def nnz(self) -> int:
        return self.pattern.nnz


def make_selection(numel: int, density: float, seed: int) -> Selection:
    """Unpruned entries at random places, as magnitude pruning without structure leaves them."""
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density
    pattern = SparsityPattern(mask)
    indices = pattern.to_indices()
    return Selection(
        density, mask, pattern, dict(zip(SELECT, (indices.int(), indices), strict=True))
    )


def make_dense(numel: int, seed: int) -> dict[torch.dtype, Tensor]:
    dense = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return {FP32: dense, BF16: dense.bfloat16()}


def ours() -> list[str]:
    """The back-ends and instruction sets that this machine has; what users get comes first."""
    return [*(f"native, {name}" for name in reversed(native.instruction_sets())), REFERENCE]


def use(name: str) -> None:
    """Have ``kernels.pack`` and ``kernels.expand`` run on one of ``ours()``."""
    backend, _, instruction_set = name.partition(", ")
    kernels.use_backend(backend)
    if instruction_set:
        native.use_instruction_set(instruction_set)


@dataclass(frozen=True)
class Case:
    """One operation, pair of dtypes and density; floors by kind (COPY, …) and by how."""

    operation: str
    source: torch.dtype
    target: torch.dtype
    density: float
    sides: dict[str, Side]
    floors: dict[tuple[str, str], Side]
    floor_bytes: dict[str, int]  # that each kind of floor moves
    moved_bytes: int  # that the operation must move
    out: Tensor  # that sides write, or return a tensor like it

    def all_sides(self) -> dict[str | tuple[str, str], Side]:
        return dict([*self.sides.items(), *self.floors.items()])


def make_case(
    operation: str,
    pair: tuple[torch.dtype, torch.dtype],
    selection: Selection,
    dense: dict[torch.dtype, Tensor],
    scratch: Tensor,
    floors: Floors,
) -> Case:
    """Build a case.

    Args:
        operation: a key of PAIRS.
        pair: dtypes of what is read and of what is written.
        selection: the unpruned entries.
        dense: the dense tensor by its dtype.
        scratch: uint8, as many bytes as the largest dense tensor, for the floors to write to.
        floors: what memory can do.
    """
    source, target = pair
    pattern = selection.pattern
    pattern_bytes = pattern.bitmap.nbytes + pattern.offsets.nbytes
    if operation == EXPAND:
        values = dense[source][: selection.nnz].clone()
        out = torch.empty(pattern.shape, dtype=target)
        sides = _expand_sides(values, out, selection)
        limits = floor_runs(floors, scratch[: out.nbytes].view(target), None, selection.density)
        whole = out.nbytes
        moved = values.nbytes + pattern_bytes + whole
    else:
        given = dense[source]
        out = torch.empty(selection.nnz, dtype=target)
        sides = _pack_sides(given, out, selection, operation == ACCUMULATE)
        limits = floor_runs(floors, scratch[: given.nbytes].view(source), given, selection.density)
        whole = given.nbytes
        moved = whole + pattern_bytes + out.nbytes * (2 if operation == ACCUMULATE else 1)
    kinds = dict.fromkeys(kind for kind, _ in limits)
    return Case(
        operation,
        source,
        target,
        selection.density,
        sides,
        {name: Side(run) for name, run in limits.items()},
        {kind: whole * (2 if kind == COPY else 1) for kind in kinds},
        moved,
        out,
    )


def floor_runs(
    floors: Floors, room: Tensor, dense: Tensor | None, density: float
) -> dict[tuple[str, str], Callable[[], object]]:
    """By kind and how: copies and reads of ``dense``, or fills where there is none to read."""
    if dense is None:
        return {
            (kind, how): partial(fill, room, content(room.dtype, share))
            for kind, share in ((ZERO_FILL, 0.0), (DATA_FILL, density))
            for how, fill in floors.fills.items()
        }
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for how, copy in floors.copies.items():
        runs[COPY, how] = partial(copy, room, dense)
    for how, read in floors.reads.items():
        runs[READ, how] = partial(read, dense)
    return runs


def case_turns(
    operation: str, pair: tuple[torch.dtype, torch.dtype], repeats: int, floors: Floors
) -> int:
    """How many turns a case has, whatever its size."""
    numel = 64
    scratch = torch.zeros(4 * numel, dtype=torch.uint8)
    selection, dense = make_selection(numel, 0.5, 0), make_dense(numel, 0)
    return turns(make_case(operation, pair, selection, dense, scratch, floors).all_sides(), repeats)


def _pack_sides(dense: Tensor, out: Tensor, selection: Selection, add: bool) -> dict[str, Side]:
    pack = partial(kernels.pack, dense, selection.pattern, out=out, accumulate=add)
    sides = {name: Side(pack, partial(use, name)) for name in ours()}
    # Torch selects without converting or adding, so these take a second pass.
    direct = dense.dtype == out.dtype and not add
    selected = out if direct else torch.empty(selection.nnz, dtype=dense.dtype)

    def finish(given: Tensor) -> Tensor:
        if direct:
            return given
        return out.add_(given) if add else out.copy_(given)

    def index_select(index: Tensor) -> Tensor:
        return finish(torch.index_select(dense, 0, index, out=selected))

    for name, index in selection.index.items():
        sides[name] = Side(partial(index_select, index))
    mask = selection.mask
    sides[MASKED_SELECT] = Side(
        lambda: finish(torch.masked_select(dense, mask, out=selected)), slow=True
    )
    sides[BOOL_INDEX] = Side(lambda: finish(dense[mask]), slow=True)
    return sides


def _expand_sides(values: Tensor, out: Tensor, selection: Selection) -> dict[str, Side]:
    expand = partial(kernels.expand, values, selection.pattern, out=out)
    sides = {name: Side(expand, partial(use, name)) for name in ours()}
    # Torch scatters values of the same dtype only.
    rounded = values if values.dtype == out.dtype else torch.empty_like(values, dtype=out.dtype)
    index = selection.index[SELECT[1]]

    def convert() -> Tensor:
        return values if rounded is values else rounded.copy_(values)

    sides[INDEX_COPY] = Side(lambda: out.zero_().index_copy_(0, index, convert()))
    sides[COPY_ONTO_ZEROS] = Side(lambda: out.index_copy_(0, index, convert()))
    sides[SCATTER] = Side(lambda: out.zero_().masked_scatter_(selection.mask, convert()), slow=True)
    return sides


def warm_up(case: Case) -> dict[str, bool]:
    """Run every side once; returns whether its result is the reference's, bit for bit."""
    expected = _result(case, REFERENCE).clone()
    exact = {name: _equal_bits(_result(case, name), expected) for name in case.sides}
    for floor in case.floors.values():
        floor.run()
    return exact


def _result(case: Case, name: str) -> Tensor:
    side = case.sides[name]
    case.out.fill_(0.0 if name == COPY_ONTO_ZEROS else 3.0)  # which must not be left standing
    if side.prepare is not None:
        side.prepare()
    result = side.run()
    assert isinstance(result, Tensor)
    return result


def _equal_bits(a: Tensor, b: Tensor) -> bool:
    bits = torch.int16 if a.itemsize == 2 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


def floor_sides(
    scratch: Tensor, dense: Tensor, density: float, floors: Floors
) -> dict[str, tuple[Side, int]]:
    """The floors and what torch offers for the same, each with the bytes that it moves."""
    room = scratch[: dense.nbytes].view(dense.dtype)
    runs = floor_runs(floors, room, dense, density) | floor_runs(floors, room, None, density)
    runs[COPY, "torch copy_"] = lambda: room.copy_(dense)
    runs[ZERO_FILL, "torch zero_"] = room.zero_
    sides = {}
    for (kind, how), run in sorted(runs.items(), key=lambda item: item[0][0]):
        run()
        sides[f"{kind}, {how}"] = (Side(run), dense.nbytes * (2 if kind == COPY else 1))
    return sides
