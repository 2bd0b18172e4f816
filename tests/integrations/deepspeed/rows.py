"""Rows of the table of combinations: a feature, and what it promises in each ZeRO stage."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.integrations.cases import Cases

from .training import BASE, Config, merged, zero

__all__ = ["STAGES", "WEIGHTS", "Refused", "Row", "Rows", "Train", "by_deepspeed", "cases", "row"]

STAGES = (0, 1, 2, 3)
WEIGHTS = ("cached", "transient")
# Losses of one training: masked dense (None) or compact, with these weights.
Train = Callable[[Config, str | None], list[float]]


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
        train: one training, for (config, weights).
        config: what the feature adds to the config.
        where: condition that the table tells, which ``train`` looks at.
    """

    name: str
    promises: Mapping[int, Promise]
    train: Train
    config: Config = field(default_factory=dict)
    where: str = ""

    def check(self, stage: int) -> None:
        """Hold the promise of one cell, in both modes. On every rank."""
        config = merged(BASE, zero(stage), self.config)
        promise = self.promises[stage]
        if isinstance(promise, Refused):
            for weights in WEIGHTS:
                with pytest.raises(Exception, match=re.escape(promise.says)):
                    self.train(config, weights)
            return
        dense = self.train(config, None)
        assert len(set(dense)) == len(dense)  # it trains
        for weights in WEIGHTS:
            compact = self.train(config, weights)
            if promise == "=":
                assert compact == dense, weights
            else:
                assert compact == pytest.approx(dense, abs=promise, rel=0), weights


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
    """Every row in every stage."""
    return {f"{name}, ZeRO {stage}": _case(rows[name], stage) for name in rows for stage in STAGES}


def _case(row: Row, stage: int) -> Callable[[int, int], None]:
    return lambda rank, world_size: row.check(stage)
