"""``sparse-comm masks make``: masks from a model on disk, which need not fit into memory.

At any time there is one tensor of the model, a mask, and all masks made so far as bits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparse_comm.cli.model_file import ModelFile, choose
from sparse_comm.cli.packed_masks import PackedMasks
from sparse_comm.cli.screen import (
    Column,
    SlowBar,
    bytes_text,
    console,
    natural_order,
    print_table,
    readable,
)
from sparse_comm.mask_file import save_masks
from sparse_comm.prune.magnitude import loads_of_each, smallest_pruned

__all__ = ["run"]

_SHOWN = 10  # rows of the table


def run(options: argparse.Namespace) -> int:
    """Make the masks, save them, say what they are; returns the exit status."""
    if options.from_zeros and options.scope:
        options.parser.error("--scope goes with --sparsity, not with --from-zeros")
    output = Path(options.output)
    _check_output(output, options.force)
    model = ModelFile(Path(options.model))
    if output.resolve() in model.files:
        raise ValueError(f"the masks would replace the model: {output} is a file of it")
    weights = choose(model, options.names, options.exclude)
    if options.from_zeros:
        made = _from_zeros(model, weights)
    else:
        made = _by_magnitude(model, weights, options.sparsity, options.scope or "global")
    masks = PackedMasks(weights)
    with _one_thread():
        for name, mask in made:
            masks.add(name, mask)
            del mask  # before the next one is made
    save_masks(masks, output)
    _report(output, model, masks)
    return 0


def _check_output(output: Path, force: bool) -> None:
    """Find out now what would stop the saving after hours."""
    folder = output.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{output}: there is no folder {folder}")
    if output.exists():
        if not output.is_file():
            raise ValueError(f"{output} is there and not an ordinary file")
        if not force:
            raise ValueError(f"{output} exists: --force replaces it")
    if not os.access(output.resolve().parent, os.W_OK):
        raise ValueError(f"{output}: the folder {folder} cannot be written to")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """More hardly help: histograms are counted by one. On busy cores they take 3 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_magnitude(
    model: ModelFile, weights: Mapping[str, Tensor], sparsity: float, scope: str
) -> Iterator[tuple[str, Tensor]]:
    loads = loads_of_each(weights, scope)
    total = loads * sum(weight.nbytes for weight in weights.values())
    with SlowBar("ranking weights", total) as bar:

        def load(name: str) -> Tensor:
            bar.advance(weights[name].nbytes)
            return model.load(name)

        yield from smallest_pruned(weights, sparsity, scope, load)


def _from_zeros(model: ModelFile, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As ``sparse_comm.masks_from_zeros``, which also knows of padding rows."""
    found = False
    with SlowBar("looking for zeros", sum(weight.nbytes for weight in weights.values())) as bar:
        for name, weight in weights.items():
            mask = model.load(name) != 0
            bar.advance(weight.nbytes)
            pruned = mask.numel() - int(mask.sum())
            if pruned == 0:
                continue
            if pruned == mask.numel():
                _warn(f"{readable(name)} is all zero and gets no mask: it stays dense")
                continue
            if weight.ndim == 2 and pruned == weight.shape[1] and not mask.any(1).all():
                _warn(
                    f"{readable(name)} is zero in just one row, like the padding row of an "
                    "embedding: --exclude it if it is not pruned"
                )
            found = True
            yield name, mask
    if not found:
        raise ValueError("no tensor is partly zero: the model is not pruned; use --sparsity")


def _report(output: Path, model: ModelFile, masks: PackedMasks) -> None:
    out = console()
    numel = sum(shape.numel() for shape in masks.shapes.values())
    nnz = sum(masks.nnz.values())
    percent = f"{100 * (numel - nnz) / numel if numel else 0:.2f} %"
    out.print(f"{output}: {_count(len(masks), 'mask')}, {bytes_text(output.stat().st_size)}")
    out.print(f"{percent} pruned: {numel - nnz:,} of {numel:,} entries")
    if dense := _dense(model, masks):
        out.print(f"tensors that stay dense: {dense}")
    out.print()
    columns = [Column("tensor"), Column("shape"), Column("density", right=True)]
    print_table(out, [*columns, Column("unpruned", right=True, expendable=1)], _rows(masks))
    if emptied := [
        name for name, shape in masks.shapes.items() if shape.numel() > masks.nnz[name] == 0
    ]:
        rest = f" and {len(emptied) - 1} more" if len(emptied) > 1 else ""
        _warn(f"nothing of {readable(emptied[0])}{rest} is left")
    code = f"sparse_comm.compact(model, sparse_comm.load_masks({json.dumps(str(output))}))"
    out.print(f"\nNext, in Python: {code}", soft_wrap=True)


def _rows(masks: PackedMasks) -> list[list[str]]:
    """A row a tensor; of many, those of lowest and of highest density."""
    names = sorted(masks, key=natural_order)
    density = {n: masks.nnz[n] / (masks.shapes[n].numel() or 1) for n in names}
    if len(names) > _SHOWN:
        names.sort(key=density.__getitem__)
    rows = [
        [readable(n), "×".join(map(str, masks.shapes[n])), f"{density[n]:.4f}", f"{masks.nnz[n]:,}"]
        for n in names
    ]
    if left_out := rows[_SHOWN // 2 : -_SHOWN // 2] if len(rows) > _SHOWN else []:
        rows[_SHOWN // 2 : -_SHOWN // 2] = [[f"… {len(left_out)} in between …", "", "", ""]]
    return rows


def _dense(model: ModelFile, masks: PackedMasks) -> str:
    """How many tensors of which kind have no mask."""
    kinds = Counter(
        "of two or more dimensions" if tensor.ndim >= 2 else "of one dimension or none"
        for name, tensor in model.floating.items()
        if name not in masks.shapes
    )
    kinds.update(f"of {dtype}" for dtype in model.other.values())
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _warn(message: str) -> None:
    print(f"sparse-comm masks make: warning: {message}", file=sys.stderr)
