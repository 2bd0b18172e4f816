"""``summary``: what is compact, what stays dense and why, in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_comm.compact.module import compact_slots
from sparse_comm.compact.slot import Slot, is_sharded

__all__ = ["Row", "Summary", "summary"]


@dataclass(frozen=True)
class Row:
    """One parameter. Bytes are those this process holds now; a shard counts as its own part."""

    name: str
    shape: tuple[int, ...]
    density: float
    state: str  # "cached", "transient", or why it stays dense
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    pattern_bytes: int = 0
    cache_bytes: int = 0
    numel: int = 0
    nnz: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return (
            self.parameter_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.pattern_bytes
            + self.cache_bytes
        )


@dataclass(frozen=True)
class Summary:
    """What ``summary`` returns: one row a parameter; prints as a table."""

    rows: list[Row] = field(default_factory=list)

    def _sum(self, what: str) -> int:
        return sum(getattr(row, what) for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of values and of parameters that stay dense."""
        return self._sum("parameter_bytes")

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients that exist now."""
        return self._sum("gradient_bytes")

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state tensors; 0 if no optimizer was given."""
        return self._sum("optimizer_bytes")

    @property
    def pattern_bytes(self) -> int:
        """Bytes of bitmaps and offsets."""
        return self._sum("pattern_bytes")

    @property
    def cache_bytes(self) -> int:
        """Bytes of cached dense weights."""
        return self._sum("cache_bytes")

    @property
    def total_bytes(self) -> int:
        """All bytes of model state."""
        return self._sum("total_bytes")

    @property
    def density(self) -> float:
        """Unpruned entries over all entries, those of unmasked parameters included (f)."""
        return self._sum("nnz") / numel if (numel := self._sum("numel")) else 1.0

    def __str__(self) -> str:
        head = ("parameter", "shape", "density", "", "param", "grad", "optim", "pattern", "cache")
        table = [head] + [_cells(row) for row in self.rows]
        total = Row(
            f"{len(self.rows)} parameters",
            (),
            self.density,
            "",
            self.parameter_bytes,
            self.gradient_bytes,
            self.optimizer_bytes,
            self.pattern_bytes,
            self.cache_bytes,
        )
        table.append(_cells(total))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 3) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        lines[1:1] = lines[-1:-1] = [rule]
        return "\n".join([*lines, f"{_unit(self.total_bytes)} of model state in this process"])


def summary(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Summary:
    """What is compact, what stays dense and why, and the bytes each takes in this process.

    Args:
        model: any model; wrapped (DDP, FSDP2) or not.
        optimizer: adds the bytes of its state.

    Returns:
        ``Summary`` with one row a parameter (tied ones once): ``print`` it, or read its fields.
        Unlike a formula it counts what exists: gradients only after a backward pass, optimizer
        state only after a step.

    Source: the terms are those of SAMO (Singh & Bhatele, IPDPS 2023, table I); ours.
    """
    slots: dict[int, Slot] = {
        id(module._parameters[attribute]): slot
        for _, module, attribute, slot in compact_slots(model)
    }
    rows = []
    for name, parameter in model.named_parameters():
        slot = slots.get(id(parameter))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        shape = parameter.shape if slot is None else slot.pattern.shape
        sizes = slot.nbytes() if slot is not None else {"pattern": 0, "cache": 0}
        rows.append(
            Row(
                name,
                tuple(shape),
                1.0 if slot is None else slot.pattern.density,
                _why_dense(parameter) if slot is None else slot.mode,
                _bytes(parameter),
                0 if parameter.grad is None else _bytes(parameter.grad),
                sum(_bytes(t) for t in state.values() if isinstance(t, Tensor)),
                sizes["pattern"],
                sizes["cache"],
                numel=shape.numel(),
                nnz=shape.numel() if slot is None else slot.pattern.nnz,
            )
        )
    return Summary(rows)


def _why_dense(parameter: nn.Parameter) -> str:
    if not parameter.is_floating_point():
        return f"dense: {parameter.dtype} cannot be compact"
    return "dense: no mask" if parameter.dim() >= 2 else "dense: no mask (bias or norm)"


def _bytes(tensor: Tensor) -> int:
    local: Any = tensor
    return local.to_local().nbytes if is_sharded(tensor) else tensor.nbytes


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        "×".join(map(str, row.shape)),
        f"{row.density:.3f}",
        row.state,
        _unit(row.parameter_bytes),
        _unit(row.gradient_bytes),
        _unit(row.optimizer_bytes),
        _unit(row.pattern_bytes),
        _unit(row.cache_bytes),
    )


def _unit(count: int) -> str:
    """Bytes for people: powers of 1000."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
