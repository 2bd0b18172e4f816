"""Rows of the table of combinations: a feature, and what it promises in each ZeRO stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.integrations.cases import Cases

from .training import BASE, Config, merged, zero

__all__ = ["STAGES", "WEIGHTS", "Losses", "Refused", "Row", "Rows", "cases", "row"]

STAGES = (0, 1, 2, 3)
WEIGHTS = ("cached", "transient")
Losses = tuple[list[float], list[float]]
Train = Callable[[Config, str], Losses]


@dataclass(frozen=True)
class Refused:
    """A combination that raises, with this in its message."""

    says: str
    by: str = "refused"  # as the table has it


def by_deepspeed(says: str) -> Refused:
    return Refused(says, "DeepSpeed refuses")


# What a cell promises: losses identical to those of masked dense training by the same
# configuration, or within a tolerance, or a refusal.
Promise = str | float | Refused


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        name: as the table has it.
        promises: by ZeRO stage.
        train: losses of masked dense and of compact training, for (config, weights).
        config: what the feature adds to the config.
        where: condition that the table tells, which ``train`` looks at.
    """

    name: str
    promises: Mapping[int, Promise]
    train: Train
    config: Config = field(default_factory=dict)
    where: str = ""

    def check(self, stage: int, weights: str) -> None:
        """Hold the promise of one cell. On every rank."""
        config = merged(BASE, zero(stage), self.config)
        promise = self.promises[stage]
        if isinstance(promise, Refused):
            with pytest.raises(Exception, match=re.escape(promise.says)):
                self.train(config, weights)
            return
        dense, compact = self.train(config, weights)
        if promise == "=":
            assert compact == dense
        else:
            assert compact == pytest.approx(dense, abs=promise, rel=0)
        assert len(set(dense)) == len(dense)  # it trains


Rows = dict[str, Row]


def row(
    rows: Rows,
    name: str,
    promises: Promise | dict[int, Any] = "=",
    where: str = "",
    **config: Any,
) -> Callable[[Train], Train]:
    """Decorator of what gives the losses of a row; all stages not named promise ``=``."""

    def register(train: Train) -> Train:
        some = promises if isinstance(promises, dict) else dict.fromkeys(STAGES, promises)
        rows[name] = Row(name, dict.fromkeys(STAGES, "=") | some, train, config, where)
        return train

    return register


def cases(rows: Rows) -> Cases:
    """Every row in every stage and mode."""
    return {
        f"{name}, ZeRO {stage}, {weights}": _case(rows[name], stage, weights)
        for name in rows
        for stage in STAGES
        for weights in WEIGHTS
    }


def _case(row: Row, stage: int, weights: str) -> Callable[[int, int], None]:
    return lambda rank, world_size: row.check(stage, weights)
